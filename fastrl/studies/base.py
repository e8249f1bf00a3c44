"""What a study is: a claim of a paper, the arms that are compared, and how one of them is trained and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from fastrl.toy.demos.evidence import Compared, Scores

CHOOSING, REPORTED = "choosing", "reported"  # rates are chosen on the first set, everything shown is of the second
Say = Callable[[str], None]
# What is expected of a comparison -> the verdicts that agree with it
EXPECTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"rises": ("rises",), "falls": ("falls",), "does not rise": ("falls", "level"), "does not fall": ("rises", "level")}
)
MARGIN = 0.02  # of a measure from 0 to 1: a change that a claim of no change still allows


class About(NamedTuple):
    """What ``fastrl study --list`` and the head of a page say."""

    name: str
    question: str
    paper: str  # and where in it
    design: str
    expected: str  # what the paper leads one to expect
    minutes: int  # of the whole study on two quiet cores, two jobs at a time
    quick_minutes: int  # likewise


@dataclass(frozen=True)
class Arm:
    """One training that is compared with others.

    Attributes:
        name: of its folder, and in tables.
        group: arms of one group share a learning rate (and a β), chosen on the group's first arm; empty: nothing is
            trained, and one seed is enough.
        options: what the study's :meth:`Study.run` reads.
        quick: also part of ``--quick``.
    """

    name: str
    group: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = True


class Job(NamedTuple):
    """One arm to be trained and measured."""

    arm: Arm
    seed: int
    rate: float | None  # learning rate; None: the recipe's
    folder: Path  # of this job alone
    shared: Path  # of the seed: what :meth:`Study.prepare` made
    sets: Sequence[str]  # to measure on: ``REPORTED``, ``CHOOSING`` or both
    beta: float | None = None  # of the method; None: the recipe's


class Measured(NamedTuple):
    """Scores of one set of records."""

    ids: Sequence[str]
    scores: Scores  # measure -> one per record
    numbers: Mapping[str, float] = {}  # measures that are defined for the whole set only


class Line(NamedTuple):
    """A line of a plot: ``points`` are (place on the x axis, name of an arm)."""

    label: str
    points: Sequence[tuple[float, str]]


class Plot(NamedTuple):
    """A plot of one measure over arms."""

    title: str
    across: str  # label of the x axis
    measure: str
    lines: Sequence[Line]


class Study(ABC):
    """An experiment. Subclasses say what is compared; ``fastrl.studies.runner`` runs it."""

    about: ClassVar[About]
    measures: Mapping[str, str]  # measure -> its title; rates are chosen by the first
    rates: Sequence[float] = ()  # geometric grid of learning rates, equal for all groups; empty: the recipe's rate
    chosen_by: Mapping[str, str] = {}  # group -> the measure by which its rate is chosen, if not by the first
    betas: Mapping[str, Sequence[float]] = {}  # group -> the grid of its β, chosen after its rate; others have none
    margins: Mapping[str, float] = {}  # measure -> how far it may change and still not rise or fall, if not ``MARGIN``
    seeds: int = 3

    def __init__(self, *, quick: bool = False, say: Say = lambda text: None) -> None:
        self.quick, self.say = quick, say

    @abstractmethod
    def arms(self) -> Sequence[Arm]:
        """All arms of the whole study."""

    @abstractmethod
    def comparisons(self) -> Sequence[Compared]:
        """What is compared, as states (arms and :meth:`differences`) and measures. Those of arms that were left out
        are skipped."""

    def claims(self) -> Mapping[str, str]:
        """Main comparisons -> what the paper leads one to expect of each (see ``EXPECTED``; of what shall not rise, or
        not fall, ``margins`` says how sure the interval has to be)."""
        return {}

    def differences(self) -> Mapping[str, tuple[str, str]]:
        """State -> (arm, other arm): record by record the first one's score minus the other's."""
        return {}

    def plots(self) -> Sequence[Plot]:
        """Plots besides the one of the comparisons."""
        return ()

    def settings(self) -> Mapping[str, Any]:
        """What a folder of results holds for; plain JSON values."""
        return {}

    @abstractmethod
    def begin(self) -> None:
        """Load what all jobs need; called before anything is written. Raises what is wrong with the settings."""

    def again(self) -> Callable[..., Study]:
        """Makes this study in another process, given ``say``; can be pickled."""
        return partial(type(self), quick=self.quick)

    def prepare(self, seed: int, shared: Path) -> None:
        """Make the files that the arms of a seed share; keeps what is there already.

        Called before the jobs of the seed, once or more often, and not necessarily in their process; never for the same
        seed at the same time. The first call for a study ends before another begins, so that it may also make what all
        seeds share."""
        return

    def prepare_training(self, seed: int, shared: Path) -> None:
        """As :meth:`prepare`, and after it: the files that only arms which are trained need."""
        return

    def obstacle(self, untrained: Mapping[str, Measured]) -> str:
        """Why nothing is trained, from what the untrained arms scored on the reported set, by arm; empty: it is.

        For claims that can only be tested on a model with some ability."""
        return ""

    @abstractmethod
    def run(self, job: Job) -> Mapping[str, Measured]:
        """Train one arm and measure it on each set of the job."""

    def findings(self, out: Path) -> Mapping[str, Any]:
        """Further results, by title: ``value``, ``low``, ``high``. Read from the folder of a finished study."""
        return {}
