"""Self-distillation: its losses by hand, the teacher, the bad input."""

import math

import pytest
import torch
from torch.nn import functional

from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import InputError, ShapeError
from latentds.models.self_distillation import SelfDistillation
from latentds.models.token_masks import global_masks
from latentds.views.crops import Views
from tests.small_vits import HEADS, SMALL, small_vit, wave_views

SEEDS = torch.arange(6) * 7919 + 3
MASKS = global_masks(SEEDS, 2, (4, 4))
TEMP = 0.05


def build(method: str = "dinov2", **options) -> SelfDistillation:
    model = SelfDistillation(small_vit(), small_vit(1), method=method, **HEADS | options)
    with torch.no_grad():  # a teacher of its own, centres that are not zero
        generator = torch.Generator().manual_seed(5)
        for tensor in model.teacher.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        model.dino_loss.center.uniform_(-0.1, 0.1, generator=generator)
        if model.patch_loss is not None:
            model.patch_loss.center.center.uniform_(-0.1, 0.1, generator=generator)
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
    center = model.dino_loss.center.clone()[0, 0]
    hidden = MASKS.flatten(0, 1) if method == "dinov2" else None
    teacher, _ = model.teach(views.globals, hidden)
    _, _, student = model.study(views, hidden)
    pairs = [(t, s) for t in range(2) for s in range(2 + local_views) if s != t]
    by_hand = torch.stack([crossed(teacher[t], center, student[s]).mean() for t, s in pairs])
    torch.testing.assert_close(run(model, views)["dino"], by_hand.mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("separate", [False, True])
def test_ibot_averages_over_an_images_hidden_tokens_then_over_all_images(separate):
    model, views = build(separate_heads=separate), wave_views(SEEDS)
    center, hidden = model.patch_loss.center.value.clone(), MASKS.flatten(0, 1)
    _, teacher = model.teach(views.globals, hidden)
    _, student, _ = model.study(views, hidden)
    losses, images = crossed(teacher, center, student), hidden.nonzero()[:, 0]
    means = [losses[images == image].mean() for image in images.unique()]
    expected = torch.stack(means).sum() / len(hidden)
    torch.testing.assert_close(run(model)["ibot"], expected, atol=1e-5, rtol=0)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    model = build()
    features, _, _ = model.study(wave_views(SEEDS), MASKS.flatten(0, 1))
    distances = [torch.cdist(f, f) for f in functional.normalize(features, dim=-1)]
    nearest = [(d + 9 * torch.eye(len(SEEDS))).min(1).values for d in distances]
    expected = -torch.stack([n.log().mean() for n in nearest]).sum()
    torch.testing.assert_close(run(model)["koleo"], expected, atol=1e-3, rtol=0)  # cdist's squares


def test_the_loss_is_the_weighted_sum_of_its_parts():
    losses = run(build(koleo_weight=0.3))
    total = losses["dino"] + losses["ibot"] + 0.3 * losses["koleo"]
    assert torch.equal(losses["loss"], total)
    assert [name for name, part in losses.items() if part.requires_grad] == ["loss"]


def test_centres_move_by_a_tenth_towards_the_teachers_mean():
    model, views = build(), wave_views(SEEDS)
    before = model.dino_loss.center.clone(), model.patch_loss.center.value.clone()
    logits, patches = model.teach(views.globals, MASKS.flatten(0, 1))
    run(model)
    moved = 0.9 * before[0] + 0.1 * logits.mean((0, 1)), 0.9 * before[1] + 0.1 * patches.mean(0)
    torch.testing.assert_close(model.dino_loss.center, moved[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.patch_loss.center.value, moved[1], atol=1e-6, rtol=0)


def test_a_batch_without_a_masked_image_leaves_the_patch_centre():
    model = build(separate_heads=True)
    before = model.patch_loss.center.value.clone()
    losses = run(model, masks=torch.zeros_like(MASKS))
    losses["loss"].backward()
    assert losses["ibot"] == 0 and torch.equal(model.patch_loss.center.value, before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_teacher_sees_global_views_without_masks():
    model, views = build(), wave_views(SEEDS)
    run(model, Views(views.globals, 1 - views.locals))
    run_with_locals = model.dino_loss.center.clone()
    other = build()
    run(other, masks=MASKS.flip(1))
    assert torch.equal(run_with_locals, other.dino_loss.center)


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


def test_a_frozen_last_layer_gets_zero_gradients():
    model = build(separate_heads=True)
    model.last_layer_frozen = True
    run(model)["loss"].backward()
    last = [p.grad for name, p in model.student.named_parameters() if "last_layer" in name]
    assert len(last) == 4 and not any(gradient.any() for gradient in last)
    model.last_layer_frozen = False
    run(model)["loss"].backward()
    assert all(gradient.any() for gradient in last)


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
    targets = ((logits - model.dino_loss.center) / 0.04).softmax(-1)
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
