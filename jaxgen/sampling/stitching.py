"""Who predicts which step: a large model, a small one, or both.

Four ways to sample with a pair of models that share a latent space and a schedule:

    Alone         one of the models throughout
    TStitch       the small one first, then the large one (arXiv 2402.14167)
    SRDiffusion   the large one sketches, the small one renders the rest (arXiv 2505.19151)
    HybridStitch  in between, the large one goes on where the picture still changes
                  (arXiv 2603.07815; a reconstruction from its abstract)

Each is a frozen value that says what to do in which steps; `jaxgen.sampling.stages` does it.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["large", "small", "hybrid"]
MaskScore = Literal["x0_diff", "v_diff", "model_diff", "user"]


class Stage(NamedTuple):
    """Consecutive steps.

    Attributes:
        kind: Who predicts.
        first: The first step.
        last: The step after the last one.
    """

    kind: Kind
    first: int
    last: int


@dataclass(frozen=True)
class Alone:
    """One model predicts every step.

    Attributes:
        model: "large" or "small".
    """

    model: Literal["large", "small"] = "large"

    def __post_init__(self):
        if self.model not in ("large", "small"):
            raise ValueError(f"model must be 'large' or 'small', got {self.model!r}")

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of a run."""
        return _without_empty(Stage(self.model, 0, steps))


@dataclass(frozen=True)
class TStitch:
    """The small model predicts the noisy steps, the large one the rest (arXiv 2402.14167).

    Attributes:
        share: Of the steps that the small model predicts; rounded to steps.
    """

    share: float = 0.4

    def __post_init__(self):
        _check_shares(share=self.share)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of a run."""
        switch = round(self.share * steps)
        return _without_empty(Stage("small", 0, switch), Stage("large", switch, steps))


@dataclass(frozen=True)
class SRDiffusion:
    """The large model predicts the noisy steps, the small one the rest (arXiv 2505.19151).

    The switch comes when predictions stop changing faster: `d_i = tanh(mean|v_i - v_{i-1}| /
    mean|v_{i-1}|)`, and `0 < d_{i-1} - d_i < threshold` in every picture of the batch. The test and
    its bounds are those of a re-implementation, not confirmed by the paper.

    Attributes:
        switch: Share of the steps, or number of steps, before a fixed switch; None: by the test.
        threshold: Of the test.
        earliest: Share of the steps that the large model predicts at least.
        latest: Share of the steps that it predicts at most.
    """

    switch: float | int | None = None
    threshold: float = 0.01
    earliest: float = 0.1
    latest: float = 0.6

    def __post_init__(self):
        if self.switch is not None:
            _check_boundary("switch", self.switch)
        _check_shares(earliest=self.earliest, latest=self.latest)
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        if self.earliest > self.latest:
            raise ValueError(
                f"earliest must be at most latest, got {self.earliest} and {self.latest}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the switch is found while sampling."""
        return self.switch is None

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of a run; with an adaptive switch those of the latest one."""
        switch = _step(self.latest if self.switch is None else self.switch, steps)
        return _without_empty(Stage("large", 0, switch), Stage("small", switch, steps))


@dataclass(frozen=True)
class HybridStitch:
    """Large model, then both by region, then the small model (arXiv 2603.07815).

    In the hybrid stage the small model predicts the whole picture and the large one the patches
    whose prediction still changed most, attending to keys and values that it remembers for all
    others. A reconstruction: the paper's text was not available, every attribute is our choice.

    Attributes:
        start: Where the hybrid stage starts, as a share of the steps or a number of steps (an
            int); 0.22 of 50 steps are 11.
        end: Where it ends, likewise.
        share: Of the patches that the large model goes on with; 0 and 1 leave one model out.
        multiple: Round the number of these patches up to a multiple of it.
        score: What decides: "x0_diff", the last two estimates of the clean picture by the large
            model; "v_diff", its last two velocities; "model_diff", the velocities of both models
            (one pass of the small model more); or "user", scores given when sampling.
        opening: Side of the squares of patches that a region is at least made of; 0: any.
        refresh: After so many hybrid steps the large model runs on all patches once, which renews
            what it remembers; 0: never.
        update: Choose the patches anew at every refresh.
        keep_text: The large model remembers the text's keys and values, too, instead of running its
            tokens at every hybrid step; not in the paper.
        blend: Width, in patches, over which regions fade into their surroundings; 0: they end.
    """

    start: float | int = 0.22
    end: float | int = 0.52
    share: float = 0.30
    multiple: int = 1
    score: MaskScore = "x0_diff"
    opening: int = 0
    refresh: int = 0
    update: bool = False
    keep_text: bool = False
    blend: int = 0

    def __post_init__(self):
        for name in ("start", "end"):
            _check_boundary(name, getattr(self, name))
        _check_shares(share=self.share)
        if self.score not in ("x0_diff", "v_diff", "model_diff", "user"):
            raise ValueError(
                "score must be one of 'x0_diff', 'v_diff', 'model_diff', 'user', "
                f"got {self.score!r}"
            )
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")
        for name in ("refresh", "blend"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.opening < 0 or (self.opening and not self.opening % 2):
            raise ValueError(f"opening must be 0 or an odd number, got {self.opening}")
        if self.update and not self.refresh:
            raise ValueError("update=True needs refresh, the steps between two updates, got 0")
        if self.update and self.score == "user":
            raise ValueError("update=True needs a score that is computed, got score='user'")

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of a run.

        Raises:
            ValueError: The hybrid stage ends before it starts, or too few large steps come before
                it for what it remembers or for its score.
        """
        start, end = _step(self.start, steps), _step(self.end, steps)
        if start > end:
            raise ValueError(f"start must not come after end, got steps {start} and {end}")
        if self.share == 1:
            return _without_empty(Stage("large", 0, end), Stage("small", end, steps))
        if self.share == 0 or start == end:
            return _without_empty(Stage("large", 0, start), Stage("small", start, steps))
        needed = 2 if self.score in ("x0_diff", "v_diff") else 1
        if start < needed:
            raise ValueError(
                f"the hybrid stage with score={self.score!r} needs {needed} large steps before it, "
                f"got start={self.start} of {steps} steps, which is step {start}"
            )
        return _without_empty(
            Stage("large", 0, start), Stage("hybrid", start, end), Stage("small", end, steps)
        )


type Policy = Alone | TStitch | SRDiffusion | HybridStitch


def relative_cost(policy: Policy, steps: int, small: float, masked: float = 0.0) -> float:
    """Return the operations of a run as a share of the large model's alone.

    Args:
        policy: The sampler; of an adaptive one the latest switch is taken.
        steps: Of the run.
        small: Operations of a pass of the small model as a share of the large one's.
        masked: Those of a masked pass of the large model; depends on its share of patches.
    """
    costs = {"large": 1.0, "small": small, "hybrid": small + masked}
    stages = policy.stages(steps)
    return sum(costs[stage.kind] * (stage.last - stage.first) for stage in stages) / steps


def _step(boundary: float | int, steps: int) -> int:
    """Return a boundary as a number of steps, at most all of them."""
    if isinstance(boundary, int | np.integer):
        return min(int(boundary), steps)
    return round(boundary * steps)


def _without_empty(*stages: Stage) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if stage.first < stage.last)


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share!r}")


def _check_boundary(name: str, boundary: float | int) -> None:
    """Checks a share of the steps, a float, or a number of steps, an int."""
    if isinstance(boundary, bool) or not isinstance(boundary, int | float):
        raise ValueError(
            f"{name} must be a share of the steps or a number of steps, got {boundary!r}"
        )
    if boundary < 0 or (isinstance(boundary, float) and not boundary <= 1):
        raise ValueError(
            f"{name} must be a share from 0.0 to 1.0 or a number of steps, got {boundary!r}"
        )
