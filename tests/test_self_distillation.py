"""Self-distillation: its losses by hand, the teacher, the bad input."""

import math

import pytest
import torch
from torch.nn import functional

from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import InputError, ShapeError
from latentds.models import self_distillation
from latentds.models.self_distillation import (
    Hidden,
    SelfDistillation,
    class_loss,
    is_last_layer,
    patch_loss,
)
from latentds.models.token_masks import global_masks
from latentds.views.view_batch import Views
from tests.small_vits import HEADS, SMALL, small_vit, wave_views

SEEDS = torch.arange(6) * 7919 + 3
MASKS = global_masks(SEEDS, 2, (4, 4))
HIDDEN = Hidden.of(MASKS.flatten(0, 1))
TEMP = 0.05


def build(method: str = "dinov2", **options) -> SelfDistillation:
    model = SelfDistillation(small_vit(), small_vit(1), method=method, **HEADS | options)
    with torch.no_grad():  # a teacher of its own, centres that are not zero
        generator = torch.Generator().manual_seed(5)
        for tensor in model.teacher.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for center in (model.center, model.patch_center):
            if center is not None:
                center.value.uniform_(-0.1, 0.1, generator=generator)
    return model.train()


def run(model: SelfDistillation, views: Views | None = None, masks=MASKS) -> dict:
    masks = None if model.mask_token is None else masks
    return model(views or wave_views(SEEDS), teacher_temp=TEMP, masks=masks)


def crossed(teacher: torch.Tensor, center: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of rows (., K), by the papers' formula."""
    targets = torch.exp((teacher - center) / TEMP)
    targets = targets / targets.sum(-1, keepdim=True)
    logits = student / 0.1
    return -(targets * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
@pytest.mark.parametrize("local_views", [0, 2])
def test_dino_is_the_mean_over_pairs_of_different_views(method, local_views):
    model, views = build(method), wave_views(SEEDS, local_views)
    center = model.center.value
    hidden = HIDDEN if method == "dinov2" else None
    teacher, _ = model.teach(views.globals, hidden)
    _, _, student = model.study(views, hidden)
    pairs = [(t, s) for t in range(2) for s in range(2 + local_views) if s != t]
    by_hand = torch.stack([crossed(teacher[t], center, student[s]).mean() for t, s in pairs])
    torch.testing.assert_close(run(model, views)["dino"], by_hand.mean(), atol=1e-5, rtol=0)


def test_ibot_averages_over_an_images_hidden_tokens_then_over_all_images():
    model, views = build(), wave_views(SEEDS)
    _, teacher = model.teach(views.globals, HIDDEN)
    _, student, _ = model.study(views, HIDDEN)
    losses = crossed(teacher, model.patch_center.value, student)
    images = MASKS.flatten(0, 1).nonzero()[:, 0]
    means = [losses[images == image].mean() for image in images.unique()]
    expected = torch.stack(means).sum() / MASKS.shape[:2].numel()
    torch.testing.assert_close(run(model)["ibot"], expected, atol=1e-5, rtol=0)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    model = build()
    features, _, _ = model.study(wave_views(SEEDS), HIDDEN)
    distances = [torch.cdist(f, f) for f in functional.normalize(features, dim=-1)]
    nearest = [(d + 9 * torch.eye(len(SEEDS))).min(1).values for d in distances]
    expected = -torch.stack([n.log().mean() for n in nearest]).sum()
    torch.testing.assert_close(run(model)["koleo"], expected, atol=1e-3, rtol=0)  # cdist's squares


def test_the_loss_is_the_weighted_sum_of_its_parts():
    losses = run(build())
    total = losses["dino"] + losses["ibot"] + 0.1 * losses["koleo"]
    assert torch.equal(losses["loss"], total)
    assert [name for name, part in losses.items() if part.requires_grad] == ["loss"]


def centers(model: SelfDistillation) -> list[torch.Tensor]:
    found = (model.center, model.patch_center)
    return [center.value.clone() for center in found if center is not None]


def test_losses_are_lightlys():
    from lightly.loss import DINOLoss, IBOTPatchLoss

    draws = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(count, 6, 64, generator=draws) for count in (2, 4))
    patches = torch.randn(2, len(HIDDEN.places), 64, generator=draws)
    center = torch.randn(1, 64, generator=draws)
    theirs, of_patches = DINOLoss(64), IBOTPatchLoss(64)
    theirs.center, of_patches.center.center = center[None].clone(), center.clone()
    expected = theirs(list(teacher), list(student), teacher_temp=TEMP)
    found = class_loss(teacher, student, center, TEMP)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    expected = of_patches(*patches, MASKS.flatten(0, 1)[:, None], teacher_temp=TEMP)
    found = patch_loss(*patches, center, TEMP, HIDDEN.weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_centres_move_by_a_tenth_towards_the_teachers_mean():
    model, views = build(), wave_views(SEEDS)
    before = centers(model)
    logits, patches = model.teach(views.globals, HIDDEN)
    run(model)
    model.update_teacher(1.0)
    moved = [0.9 * before[0] + 0.1 * logits.mean((0, 1)), 0.9 * before[1] + 0.1 * patches.mean(0)]
    torch.testing.assert_close(centers(model), moved, atol=1e-6, rtol=0)


def test_centres_move_with_the_teacher_alone_and_by_what_was_new():
    model = build()
    before = centers(model)
    run(model)
    assert all(map(torch.equal, centers(model), before))
    model.update_teacher(1.0)
    moved = centers(model)
    model.update_teacher(1.0)
    assert not torch.equal(moved[0], before[0]) and all(map(torch.equal, centers(model), moved))


def learned(model: SelfDistillation, sizes: tuple[int, ...]) -> tuple[dict, list[torch.Tensor]]:
    """Gradients and centres of a step of so many patches a pass."""
    for seeds in SEEDS.split(list(sizes)):
        loss = run(model, wave_views(seeds), global_masks(seeds, 2, (4, 4)))["loss"]
        (loss * len(seeds) / len(SEEDS)).backward()
    model.update_teacher(0.9)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, centers(model)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_two_passes_of_a_step_are_one_of_twice_the_patches(method, monkeypatch):
    monkeypatch.setattr(self_distillation, "KOLEO_WEIGHT", 0.0)  # it is of a pass's patches
    whole, halves = (learned(build(method), n) for n in ((6,), (3, 3)))
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=1e-4)  # float32 in another order


def test_koleo_is_of_the_patches_of_a_pass():
    model = build()
    whole = run(model)["koleo"]
    halves = [run(model, wave_views(s), global_masks(s, 2, (4, 4))) for s in SEEDS.split(3)]
    mean = torch.stack([half["koleo"] for half in halves]).mean()
    assert whole > mean + 0.01  # among more patches the nearest is nearer


def test_a_batch_without_a_masked_image_leaves_the_patch_centre():
    model = build()
    before = centers(model)[1]
    losses = run(model, masks=torch.zeros_like(MASKS))
    losses["loss"].backward()
    model.update_teacher(1.0)
    assert losses["ibot"] == 0 and torch.equal(centers(model)[1], before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_teacher_sees_global_views_without_masks():
    model, other, views = build(), build(), wave_views(SEEDS)
    run(model, Views(views.globals, 1 - views.locals))
    run(other, masks=MASKS.flip(1))
    model.update_teacher(1.0)
    other.update_teacher(1.0)
    assert torch.equal(model.center.value, other.center.value)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_all_of_the_student_and_nothing_of_the_teacher_gets_gradients(method):
    model = build(method)
    run(model)["loss"].backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in trained if not name.startswith("teacher.")}
    assert names == trained and any("student" in name for name in names)


def test_prototypes_keep_length_one_in_dino_only():
    scales = [build(method).student.head.last_layer.weight_g for method in ("dino", "dinov2")]
    assert [scale.requires_grad for scale in scales] == [False, True]


def test_last_layers_are_the_students_prototypes():
    model = build()
    last = [name for name, _ in model.named_parameters() if is_last_layer(name)]
    assert sorted(last) == [f"student.head.last_layer.weight_{part}" for part in "gv"]


def test_the_teacher_is_the_students_moving_average():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    model.update_teacher(0.9)
    student = model.student.state_dict()
    for name, tensor in model.teacher.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * student[name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)


def test_a_new_teacher_is_the_student():
    model = SelfDistillation(small_vit(), small_vit(1), method="dino", **HEADS)
    student = model.student.state_dict()
    assert all(torch.equal(t, student[name]) for name, t in model.teacher.state_dict().items())
    assert model.backbone is model.teacher.backbone


def test_low_precision_teachers_are_refused():
    with pytest.raises(ValueError, match="is torch.bfloat16; keep weights in float32"):
        build().bfloat16().update_teacher(0.9)


def test_training_mode_leaves_the_teacher_evaluating():
    model = build("dino").eval().train()
    assert model.student.training and not any(m.training for m in model.teacher.modules())


def test_a_saved_state_goes_on_alike():
    first, second = build(), SelfDistillation(small_vit(2), small_vit(3), method="dinov2", **HEADS)
    run(first)
    first.update_teacher(0.9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first)["loss"], run(second)["loss"])


def test_heads_follow_the_seed_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    weights = [build("dino", seed=seed).student.head.last_layer.weight_v for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_are_float32_under_autocast():
    exact = run(build())["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(build())
    assert {part.dtype for part in losses.values()} == {torch.float32}
    assert (
        abs(float((losses["loss"] - exact).detach())) < 0.1
    )  # logits of 8 bits over a temperature of 0.05


def test_latents_are_trained_on_as_images_are():
    stem = LatentStemConfig(channels=4, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4)
    changes = {name: value for name, value in SMALL.items() if name != "img_size"}
    vits = [build_vit("vit_tiny_patch16_224", stem=stem, img_px=64, **changes) for _ in range(2)]
    model = SelfDistillation(*vits, method="dinov2", **HEADS)
    views = Views(torch.randn(2, 6, 4, 8, 8), torch.randn(2, 6, 4, 4, 4))
    losses = run(model, views)
    losses["loss"].backward()
    assert vits[0].patch_embed.proj.weight.grad.any() and losses["loss"].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_a_gpu_finds_the_same_losses(method):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    views, expected = wave_views(SEEDS), run(build(method))
    views = Views(views.globals.cuda(), views.locals.cuda())
    with torch.backends.cudnn.flags(allow_tf32=False):
        losses = run(build(method).cuda(), views, MASKS.cuda())
    losses["loss"].backward()
    for name, part in losses.items():
        # another order of float32 sums, over temperatures of 0.05
        torch.testing.assert_close(part.cpu(), expected[name], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_training_does_not_collapse(method):
    model = SelfDistillation(small_vit(), small_vit(), method=method, **HEADS).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    for step in range(30):
        seeds = torch.arange(16) + 16 * step
        masks = global_masks(seeds, 2, (4, 4)) if method == "dinov2" else None
        losses = model(wave_views(seeds), teacher_temp=0.04, masks=masks)
        assert losses["loss"].isfinite()
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.update_teacher(0.9)
    logits, _ = model.teach(wave_views(torch.arange(32)).globals, None)
    targets = ((logits - model.center.value) / 0.04).softmax(-1)
    overall = targets.mean((0, 1))  # one prototype for all is 0, every image alike is log 64
    spread = -(overall * overall.clamp(min=1e-12).log()).sum()
    sharp = -(targets * targets.clamp(min=1e-12).log()).sum(-1).mean()
    assert spread - sharp > 0.5 and sharp < math.log(64) - 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, "at least 2 global views"),
        ({"masks": MASKS[:, :4]}, r"masks are \(G, B, T\) for globals"),
        ({"masks": MASKS[..., :9]}, r"masks are \(12, 9\) .*tokens are \(12, 16\)"),
    ],
)
def test_views_and_masks_that_do_not_fit_are_refused(options, message):
    views = wave_views(SEEDS)
    views = Views(views.globals[: options.get("views", 2)], views.locals)
    masks = options.get("masks", MASKS[: options.get("views", 2)])
    with pytest.raises(ShapeError, match=message):
        run(build(), views, masks)


@pytest.mark.parametrize(
    ("method", "masks", "message"),
    [
        ("dino", MASKS, "masks given; dinov2 takes"),
        ("dinov2", None, "no masks given; dinov2 takes"),
    ],
)
def test_masks_are_for_dinov2_alone(method, masks, message):
    with pytest.raises(ValueError, match=message):
        build(method)(wave_views(SEEDS), teacher_temp=TEMP, masks=masks)


def test_another_pooling_is_refused():
    vit = small_vit(class_token=False, global_pool="avg", fc_norm=False)
    with pytest.raises(InputError, match="global_pool 'avg'; self-distillation trains the class"):
        SelfDistillation(vit, vit, method="dino", **HEADS)


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="the teacher is not the student's network"):
        SelfDistillation(small_vit(), small_vit(depth=3), method="dino", **HEADS)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'simclr'; dino or dinov2"):
        SelfDistillation(small_vit(), small_vit(), method="simclr", **HEADS)
