"""Two ranks reach the losses, gradients and centres of one with the same global batch."""

import pytest
import torch

from tests.pretraining_rank import MODELS, STEPS, build, loss_of, save_steps, seeds_of, steps
from tests.trainer_ranks import started_ranks, succeed

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, processes) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    succeed(started_ranks(processes, out, 2, save_steps, STAGES, out))
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def assert_close(found: dict, expected: dict, scale: float = 1.0) -> None:
    """Sums in another order: float32 of some thousand terms, through two steps."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_have_the_loss_gradients_and_centres_of_one(kind, two_ranks):
    expected = steps(kind)
    assert float(expected["loss"]) > 0 and len(expected) > 20
    for found in two_ranks:
        assert_close(found[kind], expected)


def test_dinos_passes_on_two_ranks_are_one_pass_on_one(two_ranks):
    expected = steps("dino")
    for found in two_ranks:
        assert_close(found["dino in passes"], expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_one_rank_with_zero(kind, stage, two_ranks):
    model = build(kind)
    expected = plain_steps(model, kind)
    for found in two_ranks:
        assert_close(found[f"{kind} {stage}"], expected)


def plain_steps(model: torch.nn.Module, kind: str) -> dict:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, kind, seeds_of(number, 0, 1)).backward()
        optimizer.step()
        if kind != "mae":
            model.update_teacher(0.9)
    return model.state_dict()
