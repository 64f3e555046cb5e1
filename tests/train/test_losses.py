"""What is compared with what, and how much it weighs."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional

from onnxprune.errors import UsageError
from onnxprune.train.losses import charbonnier, losses_for
from onnxprune.train.recipe import Recipe

A, B = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.5, 2.0, 2.0]])


def resolve(recipe: Recipe, labels: bool = False, targets: bool = False, classes: bool = False, output: str = "direct"):
    """Losses of a recipe for data that has labels or targets."""
    return losses_for(recipe, labels=labels, targets=targets, classes=classes, output=output)


@pytest.mark.parametrize(
    ("labels", "targets", "task", "distill"),
    [
        pytest.param(False, False, "none", 1.0, id="bare"),
        pytest.param(True, False, "cross-entropy", 1.0, id="labels"),
        pytest.param(False, True, "l1", 0.0, id="targets"),
    ],
)
def test_defaults_follow_the_data(labels: bool, targets: bool, task: str, distill: float) -> None:
    """Distillation where there are no targets; cross-entropy for labels; l1 for targets."""
    found = resolve(Recipe(), labels, targets)
    assert (found.task, found.distill) == (task, distill)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        pytest.param("l1", 2.5 / 3, id="l1"),
        pytest.param("l2", 4.25 / 3, id="l2"),
        pytest.param("charbonnier", (math.sqrt(0.25 + 1e-6) + 1e-3 + math.sqrt(4 + 1e-6)) / 3, id="charbonnier"),
    ],
)
def test_distances_to_targets(loss: str, value: float) -> None:
    """Each distance is the mean it is defined as."""
    terms = resolve(Recipe(loss=loss), targets=True).terms([A], A, B, None)
    assert terms.keys() == {"task"}
    assert terms["task"].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        pytest.param([-1], "label -1 is none of the 3 classes", id="negative"),
        pytest.param([-100], "label -100 is none", id="what-torch-passes-over"),
        pytest.param([3], "label 3 is none", id="large"),
        pytest.param([0, 1], r"labels have shape \(2,\), outputs \(1, 3\)", id="count"),
        pytest.param([[0]], r"labels have shape \(1, 1\)", id="axes"),
    ],
)
def test_labels_are_classes_of_the_output(label: list, message: str) -> None:
    """A label that is no class of the output, or that no row of the output is for, is told."""
    losses = resolve(Recipe(distill=0.0), labels=True)
    assert losses.terms([A], A, None, torch.tensor([2]))["task"].item() == pytest.approx(0.1698, abs=1e-3)
    with pytest.raises(UsageError, match=message):
        losses.terms([A], A, None, torch.tensor(label))


def test_a_residual_network_is_compared_with_what_is_wrong_with_its_input() -> None:
    """Output residual: the target of the output is input minus target."""
    entered, clean = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    terms = resolve(Recipe(loss="l1"), targets=True, output="residual").terms(
        [torch.tensor([[2.0]])], entered, clean, None
    )
    assert terms["task"].item() == 0


def test_classes_are_compared_softened() -> None:
    """Between classes the distance is the Kullback-Leibler divergence at the temperature, times its square."""
    terms = resolve(Recipe(loss="none", temperature=2.0), classes=True).terms([A], A, None, None, [B])
    p, q = functional.softmax(B / 2, 1), functional.softmax(A / 2, 1)
    assert terms["distill"].item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-5)


def test_the_teacher_itself_costs_nothing() -> None:
    """A student that does as its teacher has no distance to it, in classes and in pictures."""
    for classes in (True, False):
        assert resolve(Recipe(), classes=classes).terms([A], A, None, None, [A])["distill"].abs().item() < 1e-6


def test_labels_weigh_beside_the_teacher() -> None:
    """With labels there is a term for each, weighted."""
    terms = resolve(Recipe(distill=0.5), labels=True).terms([A], A, None, torch.tensor([2]), [B])
    assert terms["task"].item() == pytest.approx(functional.cross_entropy(A, torch.tensor([2])).item())
    full = resolve(Recipe(distill=1.0), labels=True).terms([A], A, None, torch.tensor([2]), [B])
    assert terms["distill"].item() == pytest.approx(full["distill"].item() / 2)


def test_features_are_relative_to_the_teachers_variance() -> None:
    """Scaling both networks' features changes nothing."""
    losses = resolve(Recipe(features=2.0))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    one = losses.feature_term({"f": x}, {"f": y})
    ten = losses.feature_term({"f": 10 * x}, {"f": 10 * y})
    assert one.item() == pytest.approx(ten.item(), rel=1e-5)
    assert one.item() == pytest.approx(2 * ((x - y) ** 2).mean().item() / y.var().item(), rel=1e-5)


def test_charbonnier_is_smooth_at_zero() -> None:
    """Its gradient at equality is zero, where l1 has none."""
    x = torch.zeros(3, requires_grad=True)
    charbonnier(x, torch.zeros(3)).backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        pytest.param(Recipe(loss="l1"), "needs targets", id="targets"),
        pytest.param(Recipe(loss="cross-entropy"), "needs labels", id="labels"),
        pytest.param(Recipe(distill=0.0), "nothing to learn from", id="nothing"),
        pytest.param(Recipe(loss="cross-entropy", mixup=1.0), "needs labels|mixup", id="mixup"),
    ],
)
def test_losses_without_their_data_are_refused(recipe: Recipe, text: str) -> None:
    """A loss that the data cannot feed is refused with what it needs."""
    with pytest.raises(UsageError, match=text):
        resolve(recipe)


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": "huber"},
        {"epochs": 0},
        {"learning_rate": float("nan")},
        {"ema": 1.0},
        {"sparsity": -1.0},
        {"flip": "up"},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_recipes_out_of_range_are_refused(bad: dict) -> None:
    """A value that cannot be trained with is refused when the recipe is made."""
    with pytest.raises(UsageError, match=next(iter(bad))):
        Recipe(**bad)


def test_the_rate_rises_and_falls() -> None:
    """Warm-up rises linearly, the cosine ends at its share of the top."""
    recipe = Recipe(learning_rate=1.0, warmup=0.1, final_rate=0.01)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.01 <= rates[-1] < 0.012
