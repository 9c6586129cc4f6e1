"""What the library costs besides its arithmetic, where it can be counted; benchmarks time it."""

import contextlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from modules import draw, takes_mode
from subjects import BOTH, FIRSTS, SUBJECTS

import jaxnorm
from jaxnorm.methods import METHODS

LAYERS = {subject.method: subject for subject in SUBJECTS if subject.name in FIRSTS}
# Where Flax has the method as well.
SHARED = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
TOKENS = draw((4, 3, 8))


@contextlib.contextmanager
def compiled_programs():
    """A list that grows by one for each program that is compiled."""
    programs = []

    def listen(event: str, duration_secs: float, **_: object):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_importing_loads_nothing_but_jax_and_this_library():
    program = (
        "import sys, jax; before = set(sys.modules); import jaxnorm\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert loaded - set(sys.stdlib_module_names) <= {'jax', 'jaxnorm'}, loaded\n"
        "assert 'jax.experimental.pallas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def linen_step(method, x):
    """A training step as a function of state, and the first state."""
    cls = getattr(jaxnorm.linen, method)
    if method in LAYERS:
        model = cls(**LAYERS[method].options)
        mode = {"use_running_average": False} if takes_mode(cls) else {}
    else:
        model, mode = cls(nn.Dense(3)), ({"update_stats": True} if "Spectral" in method else {})
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, **mode))(x)

    def step(variables, x):
        def loss(params):
            held = variables | {"params": params}
            y, changed = model.apply(held, x, mutable=["batch_stats"], **mode)
            return (y**2).sum(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(variables.get("params", {}))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables.get("params", {}), gradient)
        return variables | changed | {"params": params}

    return step, variables


def nnx_step(method, x):
    """A training step as a function of state, and the first state."""
    cls, rngs = getattr(jaxnorm.nnx, method), nnx.Rngs(0)
    if method in LAYERS:
        layer = cls(x.shape[-1], rngs=rngs, **LAYERS[method].options)
    else:
        layer = cls(nnx.Linear(x.shape[-1], 3, rngs=rngs), rngs=rngs)
    layer.train()
    graph, *state = nnx.split(layer, nnx.Param, ...)

    def step(state, x):
        params, others = state

        def loss(params):
            layer = nnx.merge(graph, params, others, copy=True)
            return (layer(x) ** 2).sum(), nnx.split(layer, nnx.Param, ...)[2]

        gradient, others = jax.grad(loss, has_aux=True)(params)
        return [jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), others]

    return step, state


STEPS = {"linen": linen_step, "nnx": nnx_step}


@BOTH
@pytest.mark.parametrize("method", [method.name for method in METHODS])
@pytest.mark.usefixtures("quick_compile")
def test_training_compiles_once(method, framework):
    x = LAYERS[method].input() if method in LAYERS else TOKENS[0]
    step, state = STEPS[framework](method, x)
    step = jax.jit(step)
    # On a device by name, as in a program that places its arrays.
    state, x = jax.device_put((state, x), jax.devices()[0])
    with compiled_programs() as programs:
        for _ in range(3):
            state = step(state, x)
    assert len(programs) == 1


def train_without_jit(library, framework, method):
    """A training call, as users write it."""
    cls = getattr(getattr(library, framework), method)
    options = {"num_groups": 2} if method == "GroupNorm" else {}
    mode = {"use_running_average": False} if method == "BatchNorm" else {}
    if framework == "nnx":
        layer = cls(TOKENS.shape[-1], rngs=nnx.Rngs(0), **options)
        return lambda: layer(TOKENS, **mode)
    layer = cls(**options)
    variables = layer.init(jax.random.key(0), TOKENS, **mode)
    return lambda: layer.apply(variables, TOKENS, mutable=["batch_stats"], **mode)


@BOTH
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.usefixtures("quick_compile")
def test_without_jit_a_layer_is_fewer_programs_than_flaxs(method, framework):
    found = []
    for library in (jaxnorm, flax):
        call = train_without_jit(library, framework, method)
        jax.clear_caches()
        with compiled_programs() as programs:
            call()
        found.append(len(programs))
    ours, flaxs = found
    assert ours < flaxs


@pytest.mark.parametrize(
    "options",
    [{}, {"debias": True}, {"momentum": None}, {"skip_nonfinite": True, "ddof": 1}],
    ids=str,
)
def test_without_jit_running_statistics_move_by_one_program(options):
    x, updates = draw((6, 3)), jnp.zeros(3, jnp.int32)
    running, batch = jaxnorm.Stats(x[0], x[1] ** 2), jaxnorm.moments(x, 0)
    jax.clear_caches()
    with compiled_programs() as programs:
        for momentum in (0.9, 0.99):  # a momentum may follow a schedule
            jaxnorm.update_running(
                running, batch, updates=updates, **{"momentum": momentum} | options
            )
    assert len(programs) == 1


def test_a_call_leaves_initializers_alone():
    asked = []

    def ones(key, shape, dtype):
        asked.append(shape)
        return jnp.ones(shape, dtype)

    layer = jaxnorm.linen.LayerNorm(scale_init=ones)
    variables = layer.init(jax.random.key(0), TOKENS)
    assert asked
    asked.clear()
    layer.apply(variables, TOKENS)
    assert not asked
