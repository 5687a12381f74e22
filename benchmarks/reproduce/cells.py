"""The reproduced tables, with protocol and rows. A row has a strategy's parameters and the published figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.reproduce.streams import Curriculum

if TYPE_CHECKING:
    from collections.abc import Mapping

Settings = dict[str, Any]
Figures = tuple[float | None, ...]

LOWER_IS_BETTER = {"average_forgetting"}
DEFAULT_SEEDS = 3


@dataclass(frozen=True)
class Row:
    """A method of a table. `published`: by scenario, a percentage for each of the table's figures."""

    method: str
    published: Mapping[str, Figures]
    strategy: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)  # override the table's
    by_scenario: Mapping[str, Settings] = field(default_factory=dict)  # override both
    curriculum: Curriculum | None = None  # instead of the table's
    files: tuple[str, ...] = ()  # the first existing one gives strategy, model, learner and batch size
    note: str = ""  # what differs from the publication, and why a figure is lower


@dataclass(frozen=True)
class Table:
    """A published table: its protocol, as text and as settings."""

    name: str
    title: str
    protocol: str
    curriculum: Curriculum
    settings: Settings
    rows: tuple[Row, ...]
    figures: tuple[str, ...] = ("average_accuracy",)
    seeds: int = DEFAULT_SEEDS
    repeated: bool = True  # over seeds; false: the table shows one run


def optimizer(name: str, lr: float) -> Settings:
    """Return settings for one update a batch with this optimizer and without averaged weights."""
    return {"learner": {"updates_per_batch": 1, "average": None, "optimizer": {"name": name, "lr": lr}}}


def strengths(recipe: str, task: float, domain: float, class_: float) -> dict[str, Settings]:
    """Return a recipe's strength by scenario."""
    by_scenario = {"task": task, "domain": domain, "class": class_}
    return {scenario: {"strategy": {recipe: {"strength": value}}} for scenario, value in by_scenario.items()}


def tdc(task: float, domain: float, class_: float) -> dict[str, Figures]:
    """Return published accuracies by scenario: task, domain, class."""
    return {"task": (task,), "domain": (domain,), "class": (class_,)}


HIDDEN = {"model": {"name": "mlp", "hidden": [400, 400]}, "stream": {"batch_size": 128}}
SPLIT = HIDDEN | optimizer("adam", 1e-3)
VAE = {"hidden": 400, "latent": 100, "lr": 1e-3, "average": None, "ratio": 1.0}
MEMORY = {"budget": 1000, "selection": "balanced", "per_class": 100}
TASK_SAMPLES = 12_700  # the number of samples of the largest task

DRAWN = Curriculum("drawn", samples=2000 * 128)
IN_ORDER = Curriculum("split", samples=2000 * 128)
ORDER_NOTE = "Here the digits are in order with all seeds; theirs are drawn."

HSU = Curriculum("split", epochs=4)
HSU_CLASS = {"scenario": {"active": "seen"}}  # their class-incremental head grows with the classes
HSU_NOTE = (
    "Hsu et al. 2018: four epochs a task. They pad and normalise the images, and create a new optimizer for each task."
)

SPLIT_MNIST = Table(
    "split-mnist",
    "Split MNIST",
    """
Van de Ven, Tuytelaars & Tolias 2022: five tasks of two digits, pixels 0 to 1, MLP 784-400-400-10,
Adam 1e-3 that is never reset, 2000 batches of 128 a task with 128 replayed samples each. In `class`
all ten outputs compete from the start. The stream of a task repeats its training set, in a new
random order each time. The digits of each task are drawn with each seed except seed 0, as in their
code, because some pairs are harder to retain than others. The probe is MNIST's test set. No averaged
weights.""",
    DRAWN,
    SPLIT,
    (
        Row("naive", tdc(84.3, 60.1, 19.9), {"naive": {}}),
        Row(
            "joint",
            tdc(99.67, 98.59, 98.17),
            {"joint": {"budget": 60_000}},  # the stream repeats its samples: all of it would be 1.3 million
            note="Ours learns the tasks in order and relearns all earlier samples; theirs is trained on all tasks at once.",
        ),
        Row(
            "EWC",
            tdc(99.06, 63.0, 20.6),
            {"ewc": {"fisher": "exact", "anchor": "all", "samples": TASK_SAMPLES}},
            by_scenario=strengths("ewc", 1e5, 1e10, 1e9),
            note="Their loss has the factor 1/2, as ours does, so the strengths are equal. The Fisher information is estimated "
            "from as many draws from the stream as a task has samples.",
        ),
        Row(
            "SI",
            tdc(99.20, 66.9, 21.2),
            {"si": {"xi": 0.1}},
            # theirs is c * sum omega (theta - theta*)^2 with c = 10, 5e4, 5e3; ours has the factor 1/2
            by_scenario=strengths("si", 2 * 10.0, 2 * 5e4, 2 * 5e3),
            note="Their loss has no factor 1/2, so our strengths are twice theirs (10, 5e4, 5e3). They also integrate the "
            "penalty's gradient, without a relu; we integrate only the task's.",
        ),
        Row("LwF", tdc(99.60, 71.2, 21.9), {"lwf": {"temperature": 2.0}}),
        Row(
            "generative replay",
            tdc(99.50, 95.6, 90.4),
            {"generative": {"variant": "vae", "targets": "hard", **VAE}},
            curriculum=IN_ORDER,
            note=ORDER_NOTE,
        ),
        Row(
            "generative, soft targets",
            tdc(99.61, 96.8, 91.8),
            {"generative": {"variant": "vae", "targets": "soft", "temperature": 2.0, **VAE}},
            curriculum=IN_ORDER,
            note=f"Published in their report of 2019, arXiv 1904.07734. {ORDER_NOTE}",
        ),
        Row(
            "brain-inspired replay",
            tdc(99.61, 97.3, 94.4),
            {"generative": {"variant": "brain-inspired", "targets": "soft", "temperature": 2.0, **VAE}},
            curriculum=IN_ORDER,
            note=ORDER_NOTE,
        ),
        Row(
            "episodic replay",
            tdc(98.98, 93.8, 88.8),
            {"er": {**MEMORY, "ratio": 1.0, "balance": "tasks"}},
        ),
        Row(
            "A-GEM",
            tdc(98.54, 87.7, 65.1),
            {"agem": {**MEMORY, "momentum": "allow"}},
            note="With Adam, and with their epsilon of 1e-7 added to the reference's squared norm, as published. In "
            "`class` the result depends most on the digits of each task: 43 to 81 with ten draws, 53 with the digits in "
            "order (ten seeds).",
        ),
        Row(
            "MAS",
            tdc(99.22, 68.6, 19.5),
            {"mas": {"samples": TASK_SAMPLES}},
            # theirs is lambda * sum b (theta - theta*)^2 with lambda = 1, 1e4, 1, and b of the *mean* over C outputs
            by_scenario={
                **strengths("mas", 2 * 1.0 / 2, 2 * 1e4 / 2, 0.0),
                "class": HSU_CLASS | {"strategy": {"mas": {"strength": 2 * 1.0 / 10}}},
            },
            curriculum=HSU,
            note=f"{HSU_NOTE} The strengths are converted from theirs (1, 1e4, 1): ours has the factor 1/2, and sums over "
            "the outputs; they average. Our importance is per sample, theirs is that of a batch's mean.",
        ),
        Row(
            "GEM",
            tdc(98.4, 96.2, 92.2),
            {"gem": {"memory": 880, "margin": 0.5}, "er": {"budget": 4400, "ratio": 1.0}},
            optimizer("sgd", 0.01) | {"stream": {"batch_size": 64}},
            by_scenario={"class": HSU_CLASS},
            curriculum=HSU,
            note=f"{HSU_NOTE} Theirs also rehearses its memory, with one old sample for each new one in a batch of 128. "
            "Here that is `gem` + `er`, with 64 new and 64 old samples an update (in the first task 64 new; theirs has 128).",
        ),
    ),
)

ROTATED = {
    "model": {"name": "benchmarks.reproduce.models:glorot", "options": {"hidden": [100, 100]}},
    "stream": {"batch_size": 10},
}

MEAN_SQUARED = (
    0.008  # ratio of the squared mean gradient of 1000 samples to the mean of their squared gradients, measured here
)

ROTATIONS = Table(
    "rotations",
    "MNIST rotations",
    """
Lopez-Paz & Ranzato 2017: twenty tasks, each with all ten digits rotated by an angle of its own, from
0 to 180 degrees. 1000 samples a task, each once, in batches of 10; MLP 784-100-100-10, SGD; one head
for all tasks. The probe of a task is MNIST's test set, rotated by the same angle. BWT divides by the
number of tasks minus one (their script divides by the number of tasks).""",
    Curriculum("rotations", count=20, distinct=1000),
    ROTATED,
    (
        Row(
            "naive",
            {"class": (53.0, -8.0)},
            {"naive": {}},
            optimizer("sgd", 0.003),
            note="In all rows, the published figure is from one run with one draw of the angles.",
        ),
        Row(
            "EWC",
            {"class": (55.0, -19.0)},
            # theirs is 1000 * sum F (theta - theta*)^2, and F the square of the mean gradient of 1000 samples
            {"ewc": {"strength": 2 * 1000 * MEAN_SQUARED, "fisher": "empirical", "samples": 1000}},
            optimizer("sgd", 0.01),
            note="Theirs squares the mean gradient of 1000 samples, which gives 0.5 to 1 % of the Fisher information (measured "
            "after each of the first four tasks), and has no factor 1/2: their strength 1000 corresponds to about 16 of ours. "
            "With 2 the accuracy was 49.4, with 20 it was 57.2, and 100 diverged.",
        ),
        Row(
            "GEM",
            {"class": (86.0, 5.0)},
            {"gem": {"memory": 256, "margin": 0.5}},
            optimizer("sgd", 0.1),
            note="Here each task reaches 86 when it is learned; by the two published figures it would be 81. So later tasks "
            "can add less. A separate reimplementation of their released script (PIL's rotation, quadprog, none of this code) "
            "gives 87.3 and +1.5 over five seeds (83.7 to 88.5, -1.6 to +3.4), as ours does. Their ridge of 1e-3 is "
            "absolute; a ridge relative to the gradients lost six points with one seed of three.",
        ),
        Row(
            "shuffled",
            {"class": (83.0, 0.0)},
            {"naive": {}},
            optimizer("sgd", 0.1),
            curriculum=Curriculum("shuffled", count=20, distinct=1000),
            note="The samples of all tasks as one task in random order, evaluated on all test sets. The learning rate is not "
            "published: ours is 0.1, that of GEM, chosen after 0.03 had given 81.0.",
        ),
    ),
    figures=("average_accuracy", "backward_transfer"),
)

ONLINE = Table(
    "online",
    "Online generative replay, Split MNIST",
    """
Aljundi et al. 2019 (MIR): class-incremental, each sample seen once, MLP 400-400. They publish
79.3 ± 0.6 with a forgetting of 19.5, and 82.9 for their best variant. Ours is the default job:
generative replay with synaptic intelligence and averaged weights.""",
    Curriculum("split", distinct=1000),
    HIDDEN,
    (
        Row(
            "default, 1000 a task",
            {"class": (79.3, 19.5)},
            files=("configs/mnist-online.yaml", "configs/generative-si.yaml"),
        ),
        Row(
            "default, all 60,000",
            {"class": (None, None)},
            files=("configs/mnist-split.yaml",),
            curriculum=Curriculum("split"),
            note="No figure is published for this; a prototype before this project reached 94.5.",
        ),
    ),
    figures=("average_accuracy", "average_forgetting"),
    seeds=5,
)

ISOLATION = Table(
    "isolation",
    "PackNet and progressive networks",
    """
The protocol of Split MNIST, task-incremental. The published figure is that of separate networks, one
for each task (van de Ven et al. 2022): nothing may be forgotten, and accuracy may not be lower than
theirs. The digits are in order.""",
    IN_ORDER,
    SPLIT,
    (
        Row("PackNet", {"task": (99.57, 0.0)}, {"packnet": {"retrain_epochs": 5, "samples": TASK_SAMPLES}}),
        Row("progressive networks", {"task": (99.57, 0.0)}, {"pnn": {}}),
    ),
    figures=("average_accuracy", "average_forgetting"),
)

DEMONSTRATED: dict[str, Settings] = {
    "sequential": {"naive": {}},
    "joint": {"joint": {}},
    "generative replay": {"generative": {"average": None, "ratio": 1.0}},
    "EWC": {"ewc": {"strength": 5000.0}},
    "SI": {"si": {"strength": 10.0}},
    "MAS": {"mas": {"strength": 1.0}},
    "RWalk": {"rwalk": {"strength": 10.0}},
    "L2": {"l2": {"strength": 0.1}},
    "GEM": {"gem": {"momentum": "allow"}},
    "progressive networks": {"pnn": {}},
    "PackNet": {"packnet": {"samples": TASK_SAMPLES}},
}

TWO_TASKS = Table(
    "two-tasks",
    "Two tasks, one after the other",
    """
The demonstration of Kirkpatrick et al. 2017: all ten digits, then all ten digits with permuted
pixels; one head of ten outputs (`domain`), MLP 784-400-400-10, Adam 1e-3, four epochs of each task
in batches of 128, no averaged weights. The line is the accuracy on the first task along the stream:
it falls if the second task is learned without protection, and stays if the first is retained. The
strengths were chosen in a few short runs. GEM runs with Adam here, as all other methods do.""",
    Curriculum("permuted", count=2, epochs=4),
    SPLIT | {"probes": {"every": 40}},
    tuple(Row(name, {"domain": (None, None)}, strategy) for name, strategy in DEMONSTRATED.items()),
    figures=("average_accuracy", "average_forgetting"),
    seeds=1,
    repeated=False,
)

PUBLISHED = (SPLIT_MNIST, ROTATIONS, ONLINE, ISOLATION)
TABLES = (*PUBLISHED, TWO_TASKS)
