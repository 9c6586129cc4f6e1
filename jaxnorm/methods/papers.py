"""The papers behind the methods, as data, and their BibTeX."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv.

    Attributes:
        key: of its BibTeX entry.
        title: of the paper.
        authors: "First Last", in order.
        year: of its appearance on arXiv.
        arxiv: its number there.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str

    @property
    def short(self) -> str:
        """`Ioffe & Szegedy 2015`, `Ba et al. 2016`."""
        last = [author.rsplit(" ", 1)[-1] for author in self.authors]
        names = " & ".join(last) if len(last) < 3 else f"{last[0]} et al."
        return f"{names} {self.year}"

    @property
    def bibtex(self) -> str:
        """The entry, with the title's capitals kept."""
        return (
            f"@misc{{{self.key},\n"
            f"  title = {{{{{self.title}}}}},\n"
            f"  author = {{{' and '.join(self.authors)}}},\n"
            f"  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n"
            f"  archivePrefix = {{arXiv}},\n"
            f"}}"
        )


BATCH_NORM = Paper(
    "ioffe2015batch",
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    ("Sergey Ioffe", "Christian Szegedy"),
    2015,
    "1502.03167",
)
LAYER_NORM = Paper(
    "ba2016layer",
    "Layer Normalization",
    ("Jimmy Lei Ba", "Jamie Ryan Kiros", "Geoffrey E. Hinton"),
    2016,
    "1607.06450",
)
RMS_NORM = Paper(
    "zhang2019root",
    "Root Mean Square Layer Normalization",
    ("Biao Zhang", "Rico Sennrich"),
    2019,
    "1910.07467",
)
GROUP_NORM = Paper(
    "wu2018group", "Group Normalization", ("Yuxin Wu", "Kaiming He"), 2018, "1803.08494"
)
INSTANCE_NORM = Paper(
    "ulyanov2016instance",
    "Instance Normalization: The Missing Ingredient for Fast Stylization",
    ("Dmitry Ulyanov", "Andrea Vedaldi", "Victor Lempitsky"),
    2016,
    "1607.08022",
)
BATCH_RENORM = Paper(
    "ioffe2017batch",
    "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    ("Sergey Ioffe",),
    2017,
    "1702.03275",
)
DECORRELATED_BATCH_NORM = Paper(
    "huang2018decorrelated",
    "Decorrelated Batch Normalization",
    ("Lei Huang", "Dawei Yang", "Bo Lang", "Jia Deng"),
    2018,
    "1804.08450",
)
ITER_NORM = Paper(
    "huang2019iterative",
    "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
    ("Lei Huang", "Yi Zhou", "Fan Zhu", "Li Liu", "Ling Shao"),
    2019,
    "1904.03441",
)
IBN_NET = Paper(
    "pan2018two",
    "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    ("Xingang Pan", "Ping Luo", "Jianping Shi", "Xiaoou Tang"),
    2018,
    "1807.09441",
)
SWITCHABLE_NORM = Paper(
    "luo2018differentiable",
    "Differentiable Learning-to-Normalize via Switchable Normalization",
    ("Ping Luo", "Jiamin Ren", "Zhanglin Peng", "Ruimao Zhang", "Jingyu Li"),
    2018,
    "1806.10779",
)
ADABN = Paper(
    "li2016revisiting",
    "Revisiting Batch Normalization For Practical Domain Adaptation",
    ("Yanghao Li", "Naiyan Wang", "Jianping Shi", "Jiaying Liu", "Xiaodi Hou"),
    2016,
    "1603.04779",
)
ADVPROP = Paper(
    "xie2019adversarial",
    "Adversarial Examples Improve Image Recognition",
    ("Cihang Xie", "Mingxing Tan", "Boqing Gong", "Jiang Wang", "Alan Yuille", "Quoc V. Le"),
    2019,
    "1911.09665",
)
WEIGHT_NORM = Paper(
    "salimans2016weight",
    "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural"
    " Networks",
    ("Tim Salimans", "Diederik P. Kingma"),
    2016,
    "1602.07868",
)
SPECTRAL_NORM = Paper(
    "miyato2018spectral",
    "Spectral Normalization for Generative Adversarial Networks",
    ("Takeru Miyato", "Toshiki Kataoka", "Masanori Koyama", "Yuichi Yoshida"),
    2018,
    "1802.05957",
)
WEIGHT_STANDARDIZATION = Paper(
    "qiao2019micro",
    "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    ("Siyuan Qiao", "Huiyu Wang", "Chenxi Liu", "Wei Shen", "Alan Yuille"),
    2019,
    "1903.10520",
)
SCALED_WEIGHT_STANDARDIZATION = Paper(
    "brock2021characterizing",
    "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    ("Andrew Brock", "Soham De", "Samuel L. Smith"),
    2021,
    "2101.08692",
)
