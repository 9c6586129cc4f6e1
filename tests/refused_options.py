"""Options of scripts that make no sense. Part of the laws of `test_examples.py`."""

from pathlib import Path

OF_ALL = [
    ({"record": True, "quick": True}, "--record keeps full results"),
    ({"seeds": ()}, "--seeds must be numbers from 0 on"),
    ({"seeds": (-1,)}, "--seeds must be numbers from 0 on"),
    ({"seeds": (0, 0)}, "--seeds must differ"),
    ({"seed": -1}, "--seed must be at least 0, not -1"),
    ({"steps": 0}, "--(steps|every) "),
    ({"batch_size": 0}, "--batch-size "),
    ({"out": Path("picture.txt")}, "--out must end in"),
    ({"out": Path("nowhere/picture.png")}, "there is no folder nowhere"),
]
"""For every script that has these options: the change, and what the message says."""

OF_ONE = {
    "adabn_digits": [
        (
            {"data": "mnist"},
            "JAXNORM_DATA to name a folder with mnist.npz and usps.npz; --data digits",
        ),
    ],
    "batch_norm_devices": [
        ({"devices": 0}, "--devices must be at least 1, not 0"),
        ({"ways": ()}, "--ways needs at least one of jit, shard_map, pmap, processes"),
        ({"batch_size": 100}, "100 does not fit 8 devices evenly; --batch-size 104 does"),
        ({"devices": 9, "batch_size": 9}, "--devices 9, but the 1 processes have 8"),
    ],
    "batch_norm_digits": [
        ({"data": "usps"}, "--data usps needs .*; --data digits needs no files"),
        ({"learning_rate": -1.0}, "--learning-rate must be a positive number, not -1.0"),
        ({"batch_size": 5000}, "5000 images is more than the 1347 training images"),
    ],
    "batch_norm_digits_nnx": [
        ({"width": 0}, "--width must be at least 1"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a positive number"),
    ],
    "batch_norm_figure_1": [
        ({"steps": 25}, "--steps must be a multiple of --record-every, from two looks on"),
        ({"steps": 90}, "--steps must be a multiple of --record-every"),
        ({"record_every": 0}, "--steps must be a multiple of --record-every"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
        ({"batch_size": 5000}, "is more than the 1347 training images"),
        ({"train_images": 50}, "is more than the 50 training images"),
    ],
    "batch_size": [
        ({"sizes": (0,)}, "--sizes must be 2 or more"),
        ({"sizes": ()}, "--sizes must be 2 or more"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"rate": -1.0}, "--rate and --dependent-rate positive"),
        ({"sizes": (5000,), "train_images": 50}, "5000 images is more than the 50"),
        ({"train_images": 0}, "0 training images are none"),
    ],
    "before_or_after": [
        ({"rates": ()}, "--rates must be positive numbers"),
        ({"rates": (0.0,)}, "--rates must be positive numbers"),
        ({"steps": 25}, "--steps must be 50 or more"),
        ({"steps": 110}, "--steps must be 50 or more, by 25, not 110"),
        ({"layers": 0}, "--layers must be at least 1"),
    ],
    "contrast_and_style": [
        ({"test_images": 0}, "--steps and --test-images must be at least 1"),
        ({"batch_size": 500}, "--batch-size must be from 2 to"),
    ],
    "corrupted_digits": [
        ({"tent_rate": 0.0}, "--tent-rate positive"),
        ({"train_images": 10}, "must be at least 64"),
        ({"foreign": True}, "JAXNORM_DATA"),
    ],
    "fold_batch_norm": [
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"blocks": 0}, "--blocks must be at least 1, not 0"),
    ],
    "learning_rates": [
        ({"rates": ()}, "--rates must be positive numbers"),
        ({"rates": (0.1, -1.0)}, "--rates must be positive numbers"),
        ({"scales": (float("inf"),)}, "--scales must be positive numbers"),
        ({"steps": 90}, "--steps must be a multiple of 25, not 90"),
    ],
    "population_statistics": [
        ({"sizes": (1,)}, "--sizes must be 2 or more"),
        ({"sizes": (5000,)}, "training images only"),
        ({"momenta": (1.0,)}, "--momenta must be at least 0 and less than 1"),
        ({"samples": (8,)}, "--samples must be 32 or more"),
        ({"seen_in": (1,)}, "--seen-in must be from 2 to 256"),
        ({"steps": 5}, "--steps must be at least 10"),
    ],
    "transformer_memory": [
        ({"norms": ()}, "--norms needs LayerNorm"),
        ({"width": 100}, "--width must be a multiple of 128"),
        ({"length": 0}, "--sequences and --length must be at least 1"),
    ],
    "weight_norms": [
        ({"early": 9}, "--early must be from 1 to --epochs"),
        ({"rates": ()}, "--rates and --sgd-rate must be more than 0"),
        ({"sgd_rate": 0.0}, "--rates and --sgd-rate must be more than 0"),
        ({"train_images": 8}, "--train-images must be at least 32"),
    ],
    "where_the_benefit_comes_from": [
        ({"depth": 0}, "--depth must be at least 1, not 0"),
        ({"every": 500}, "--every must be from 1 to --steps, not 500 with 400 steps"),
        ({"rate": 0.0}, "--rate must be above 0, not 0.0"),
    ],
    "whitening": [
        ({"group": 5}, "--group must divide --width"),
        ({"rates": (0.0,)}, "--rates must be positive"),
        ({"iterations": (0,)}, "--iterations must be 1 or more"),
        ({"batch_size": 5000}, "training images only"),
    ],
}
"""For each script, what it alone refuses."""
