"""What policies do in which steps."""

import pytest

from jaxgen.sampling import Alone, HybridStitch, SRDiffusion, Stage, TStitch, relative_cost


@pytest.mark.parametrize(
    ("policy", "stages"),
    [
        (Alone(), [("large", 0, 50)]),
        (Alone("small"), [("small", 0, 50)]),
        (TStitch(), [("small", 0, 20), ("large", 20, 50)]),
        (TStitch(0.0), [("large", 0, 50)]),
        (TStitch(1), [("small", 0, 50)]),
        (SRDiffusion(0.5), [("large", 0, 25), ("small", 25, 50)]),
        (SRDiffusion(7), [("large", 0, 7), ("small", 7, 50)]),
        (SRDiffusion(), [("large", 0, 30), ("small", 30, 50)]),
        (HybridStitch(), [("large", 0, 11), ("hybrid", 11, 26), ("small", 26, 50)]),
        (HybridStitch(2, 50), [("large", 0, 2), ("hybrid", 2, 50)]),
        # The limits, section by section: large alone, small alone, a fixed switch.
        (HybridStitch(1.0, 1.0), [("large", 0, 50)]),
        (HybridStitch(0, 0), [("small", 0, 50)]),
        (HybridStitch(9, 9), [("large", 0, 9), ("small", 9, 50)]),
        (HybridStitch(share=1), [("large", 0, 26), ("small", 26, 50)]),
        (HybridStitch(share=0), [("large", 0, 11), ("small", 11, 50)]),
        (HybridStitch(1, 3, score="model_diff"),
         [("large", 0, 1), ("hybrid", 1, 3), ("small", 3, 50)]),
    ],
)  # fmt: skip
def test_stages_of_50_steps(policy, stages):
    assert policy.stages(50) == tuple(Stage(*stage) for stage in stages)


def test_costs_are_those_of_the_model_of_operations():
    # Section 4 of the paper's summary: SD3-Medium beside SD3.5-Large, 30 % of the patches.
    assert 1 / relative_cost(HybridStitch(), 50, 0.286, 0.352) == pytest.approx(1.82, abs=0.01)
    assert 1 / relative_cost(HybridStitch(), 50, 0.361, 0.352) == pytest.approx(1.65, abs=0.01)
    assert relative_cost(Alone(), 50, 0.286) == 1
    assert relative_cost(Alone("small"), 50, 0.286) == pytest.approx(0.286)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alone("both"), "model must be 'large' or 'small', got 'both'"),
        (lambda: TStitch(1.5), "share must be between 0 and 1, got 1.5"),
        (lambda: TStitch(True), "share must be between 0 and 1, got True"),
        (lambda: SRDiffusion(-1), "switch must be a share from 0.0 to 1.0 or .*, got -1"),
        (lambda: SRDiffusion(1.5), "switch must be a share from 0.0 to 1.0 or .*, got 1.5"),
        (lambda: SRDiffusion(threshold=0.0), "threshold must be positive, got 0.0"),
        (lambda: SRDiffusion(earliest=0.7), "earliest must be at most latest, got 0.7 and 0.6"),
        (lambda: HybridStitch("0.2"), "start must be a share of the steps or .*, got '0.2'"),
        (lambda: HybridStitch(True), "start must be a share of the steps or .*, got True"),
        (lambda: HybridStitch(share=2), "share must be between 0 and 1, got 2"),
        (lambda: HybridStitch(score="x0"), "score must be one of 'x0_diff', .*, got 'x0'"),
        (lambda: HybridStitch(multiple=0), "multiple must be at least 1, got 0"),
        (lambda: HybridStitch(refresh=-1), "refresh must not be negative, got -1"),
        (lambda: HybridStitch(blend=-1), "blend must not be negative, got -1"),
        (lambda: HybridStitch(opening=2), "opening must be 0 or an odd number, got 2"),
        (lambda: HybridStitch(update=True), "update=True needs refresh, .* got 0"),
        (lambda: HybridStitch(update=True, refresh=2, score="user"), "needs a score that is"),
        (lambda: HybridStitch(0.6, 0.5).stages(50), "must not come after end, got steps 30 and 25"),
        (lambda: HybridStitch(1, 3).stages(50), "needs 2 large steps before it, got start=1 of 50"),
        (lambda: HybridStitch(0, 3, score="user").stages(9), "needs 1 large steps before it"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
