"""Distillation: losses against naive ones, each method lowers its own, projections leave no trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llmslim.anatomy import Anatomy
from llmslim.distillation.features import Features
from llmslim.distillation.relations import Relations
from llmslim.distillation.response import Response
from llmslim.errors import UserError
from llmslim.loaders.texts import sample
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.pruning.layers import PruneLayers
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.training import losses
from llmslim.training.forward import Scores, observe, sampled
from llmslim.training.pairing import projection
from tests import reference
from tests.checkpoints import killed_at_training_step
from tests.test_evaluation_glue import save_classifier
from tests.test_recovery import tensors, whole
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
FAST: dict[str, Any] = {"max_steps": 12, "batch_size": 4, "lr": 2e-3}
KINDS: list[Any] = ["forward", "reverse", "js"]
GENTLE: dict[str, Any] = {"max_steps": 20, "lr": 5e-4}  # for students that are close already
NARROW = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers by family, and for each a student: another tiny model, or for llama a smaller one."""
    root = tmp_path_factory.mktemp("models")
    made = {family: save_tiny(family, root / family) for family in ("llama", "gpt2", "bert")}
    made |= {f"{family} student": save_tiny(family, root / f"{family}-s", 1) for family in ("gpt2", "bert")}
    made["llama student"] = save_tiny("llama", root / "llama-s", 1, **NARROW)
    return made


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def windows(seq: int = 32) -> torch.Tensor:
    return sample("builtin", tiny_tokenizer(), 8, seq, 0).tokens


def value(step: Any, student: Path, teacher: Path) -> float:
    """What the step minimizes, on the windows that it trains on; projections are fitted anew."""
    model, tokens = whole(student), windows()
    loss, _ = step.criterion(model, whole(teacher), tokens)
    with torch.no_grad():
        return float(loss(model, tokens))


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_the_naive_one(kind: Any, temperature: float) -> None:
    student, teacher = torch.randn(2, 150, 7), torch.randn(2, 150, 7)  # more tokens than a chunk
    found = losses.divergence(student, teacher, temperature, kind, 0.3)
    wanted = reference.divergence(student, teacher, temperature, kind, 0.3)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_divergence_is_that_of_torch_distributions() -> None:
    from torch.distributions import Categorical, kl_divergence

    student, teacher = torch.randn(20, 11), torch.randn(20, 11)
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    forward, reverse = kl_divergence(p, q).mean(), kl_divergence(q, p).mean()
    torch.testing.assert_close(losses.divergence(student, teacher), forward)
    torch.testing.assert_close(losses.divergence(student, teacher, kind="reverse"), reverse)
    near = losses.divergence(student, teacher, kind="js", beta=1e-3) / 1e-3  # the limits that GKD names
    assert float(near) == pytest.approx(float(forward), rel=5e-2)
    near = losses.divergence(student, teacher, kind="js", beta=1 - 1e-3) / 1e-3
    assert float(near) == pytest.approx(float(reverse), rel=5e-2)
    apart = losses.divergence(student * 1000, teacher * 1000, kind="js")
    assert 0 < float(apart) <= math.log(2)


def test_gradients_are_those_of_autograd() -> None:
    student, teacher = torch.randn(1, 300, 7, requires_grad=True), torch.randn(1, 300, 7)
    tokens = torch.randint(7, (1, 300))
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = 0.3 * p + 0.7 * q
    labels = -q[0, :-1].gather(-1, tokens[0, 1:, None]).log().mean()
    forward = (p * (p / q).log()).sum(-1).mean()
    ids, top, tail = losses.likeliest(teacher, 7)
    pairs = {
        "forward": (losses.divergence(student, teacher), forward),
        "reverse": (losses.divergence(student, teacher, kind="reverse"), (q * (q / p).log()).sum(-1).mean()),
        "js": (
            losses.divergence(student, teacher, kind="js", beta=0.3),
            (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1).mean(),
        ),
        "cached": (losses.coarse_divergence(student, ids, top, tail), forward),
        "both": (
            0.3 * losses.divergence(student, teacher) + 0.7 * losses.next_token(student, tokens),
            0.3 * forward + 0.7 * labels,
        ),
    }
    for name, pair in pairs.items():
        gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in pair]
        torch.testing.assert_close(
            *gradients, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_self_relations_are_the_naive_ones_at_any_width(heads: int) -> None:
    student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 16)
    found = losses.self_relations(student, teacher, heads)
    assert float(found) == pytest.approx(reference.self_relations(student, teacher, heads), rel=1e-5)


def test_relations_between_samples_are_the_naive_ones_at_any_width() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 8) * 3
    for name in ("distances", "angles"):
        found = getattr(losses, name)(student, teacher)
        assert float(found) == pytest.approx(getattr(reference, name)(student, teacher), rel=1e-4)


def test_relations_between_samples_do_not_see_a_similarity() -> None:
    """Moved, turned and scaled samples lie to each other as before."""
    teacher = torch.randn(6, 8)
    turned = 5 * teacher @ torch.linalg.qr(torch.randn(8, 8))[0] + 2
    assert float(losses.distances(turned, teacher)) < 1e-10
    assert float(losses.angles(turned, teacher)) < 1e-10


def test_few_samples_give_no_relation_and_no_nan() -> None:
    for count, loss in ((1, losses.distances), (1, losses.angles), (2, losses.angles)):
        student = torch.randn(count, 4, requires_grad=True)
        value = loss(student, torch.randn(count, 4))
        value.backward()
        assert value == 0 and student.grad is not None and not student.grad.any()
    same = torch.ones(4, 3, requires_grad=True)  # no distance at all
    (losses.distances(same, torch.ones(4, 3)) + losses.angles(same, torch.ones(4, 3))).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_relations_in_groups_leave_out_what_is_not_there() -> None:
    student, teacher = torch.randn(3, 5, 3), torch.randn(3, 5, 8) * 3
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True, False, True, True, False]])
    student[~mask], teacher[~mask] = 1e6, -1e6
    kept = [(s[m], t[m]) for s, t, m in zip(student, teacher, mask, strict=True)]
    for name, count in (
        ("distances", lambda n: n * (n - 1) / 2),
        ("angles", lambda n: n * (n - 1) * (n - 2)),
    ):
        counts = [count(len(s)) for s, _ in kept]
        naive = [getattr(reference, name)(*pair) for pair in kept]
        wanted = sum(c * x for c, x in zip(counts, naive, strict=True)) / sum(counts)
        found = getattr(losses, name)(student, teacher, mask)
        assert float(found) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_neox", "bert", "modernbert"])
def test_the_scores_seen_are_those_that_attention_softmaxes(family: str) -> None:
    """Of grouped heads, rotary positions, sliding windows and padding; against transformers' eager attention."""
    model = tiny_model(family)
    attentions = [block.attention.module for block in Anatomy(model).blocks]
    inputs = {"input_ids": torch.randint(5, 512, (2, 20)), "attention_mask": torch.ones(2, 20).long()}
    inputs["attention_mask"][1, 14:] = 0
    with torch.no_grad():
        seen = observe(model, inputs, [], attentions)
        model.set_attn_implementation("eager")
        wanted = model(**inputs, output_attentions=True)
    torch.testing.assert_close(seen.output.logits[0], wanted.logits[0], atol=1e-4, rtol=1e-4)
    real = inputs["attention_mask"].bool()[:, None, :, None]
    for scores, weights in zip(seen.scores, wanted.attentions, strict=True):
        found = scores.values.masked_fill(~scores.allowed, -torch.inf).softmax(-1)
        torch.testing.assert_close(found.where(real, 0), weights.where(real, 0), atol=1e-5, rtol=1e-4)


def test_attention_scores_are_compared_where_both_see() -> None:
    mine, its = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    causal, mask = (
        torch.ones(4, 4, dtype=torch.bool).tril(),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    found = losses.attention_scores(Scores(mine, causal), Scores(its, torch.ones_like(causal)), mask)
    errors = [
        float(mine[b, h, i, j] - its[b, h, i, j]) ** 2
        for b, length in enumerate((4, 2))
        for h in range(3)
        for i in range(length)
        for j in range(i + 1)
    ]
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


LOSSES: dict[str, Any] = {
    **{kind: lambda s, t, kind=kind: losses.divergence(s, t, 2.0, kind, 0.3) for kind in KINDS},
    "hidden_states": losses.hidden_states,
    "self_relations": lambda s, t: losses.self_relations(s, t, 2),
    "distances": lambda s, t: losses.distances(s[0], t[0]),
    "angles": lambda s, t: losses.angles(s[0], t[0]),
    "attention_scores": lambda s, t: losses.attention_scores(
        *(Scores(x[:, None], torch.ones(8, dtype=torch.bool)) for x in (s, t))
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_zero_at_the_teacher_and_its_gradient_leads_there(name: str) -> None:
    torch.manual_seed(0)
    loss, teacher = LOSSES[name], torch.randn(2, 6, 8)
    assert abs(float(loss(teacher, teacher))) < 1e-6
    student = (teacher + torch.randn(2, 6, 8)).requires_grad_()
    begun = loss(student, teacher).item()
    optimizer = torch.optim.Adam([student], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
    assert begun > 0 and value.item() < 0.02 * begun


def test_hidden_states_are_compared_relative_to_the_teachers() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    pairs = zip(student.reshape(6, 4), teacher.reshape(6, 4), strict=True)
    naive = sum(float((s - t) @ (s - t) / (t @ t)) for s, t in pairs) / 6
    assert float(losses.hidden_states(student, teacher)) == pytest.approx(naive, rel=1e-5)
    scaled = losses.hidden_states(student * 100, teacher * 100)
    torch.testing.assert_close(scaled, losses.hidden_states(student, teacher))


def test_a_projection_starts_as_the_least_squares_fit() -> None:
    x, y = torch.randn(50, 3), torch.randn(50, 5)
    with torch.no_grad():
        linear = projection(x, y)
        wanted = torch.linalg.lstsq(x, y).solution
        torch.testing.assert_close(linear(x), x @ wanted, atol=1e-2, rtol=1e-2)
    assert isinstance(projection(x, x), nn.Identity)


# --- on policy ----------------------------------------------------------------------------------------------


def test_a_student_writes_from_its_own_distribution() -> None:
    model = tiny_model("llama", vocab_size=16)
    prompt = torch.tensor([[5, 6, 7]]).expand(4000, -1)
    text = sampled(model.train(), prompt, 2)
    assert model.training and text.shape == (4000, 5) and torch.equal(text[:, :3], prompt)
    model.eval()
    with torch.no_grad():
        first = model(prompt[:1]).logits[0, -1].softmax(-1)
        seen = torch.bincount(text[:, 3], minlength=16) / 4000
        torch.testing.assert_close(seen, first, atol=0.04, rtol=0)
        likely = int(first.argmax())  # and what follows is drawn behind what was written
        second = model(torch.tensor([[5, 6, 7, likely]])).logits[0, -1].softmax(-1)
    after = text[text[:, 3] == likely, 4]
    torch.testing.assert_close(torch.bincount(after, minlength=16) / len(after), second, atol=0.1, rtol=0)


def test_what_the_student_wrote_is_judged_where_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmslim.training import forward

    model, teacher, tokens = tiny_model("llama", 1), tiny_model("llama"), windows(16)
    own = torch.cat([tokens[:, :8], tokens[:, :8].flip(1)], 1)
    monkeypatch.setattr(forward, "sampled", lambda model, prompt, length, known: own)
    loss, _ = Response(on_policy=1.0, alpha=0.5).criterion(model, teacher, tokens)
    with torch.no_grad():
        wanted = losses.divergence(model(own).logits[:, 7:15], teacher(own).logits[:, 7:15])
        plain = losses.divergence(model(tokens).logits, teacher(tokens).logits)
        hard = losses.next_token(model(tokens).logits, tokens)
        torch.testing.assert_close(loss(model, tokens), 0.5 * plain + 0.5 * hard)  # in validation
    torch.testing.assert_close(loss(model, tokens).detach(), 0.5 * wanted)


# --- methods ------------------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {
    "forward": Response(**FAST),
    "reverse": Response(divergence="reverse", temperature=2.0, **FAST),
    "js": Response(divergence="js", beta=0.1, **FAST),
    "labels": Response(alpha=0.5, **FAST),
    "on-policy": Response(on_policy=0.5, **FAST),
    "hidden": Features(attention=0, response=0, **FAST),
    "last": Features(layer_map="last", attention=0, response=0, **FAST),
    "attention": Features(hidden=0, response=0, **FAST),
    "features": Features(**FAST),
    "distance": Relations(angle=0, response=0, **FAST),
    "angle": Relations(distance=0, response=0, **FAST),
    "relations": Relations(**FAST),
    "maps": Response(attention_maps=1, response=0, **FAST),
    "tokens": Response(token_distance=25, token_angle=50, response=0, **FAST),
    "all": Response(
        alpha=0.5,
        divergence="reverse",
        attention_maps=1,
        hidden=1,
        attention=1,
        token_angle=1,
        angle=1,
        **FAST,
    ),
}
RUNS = [
    *(
        (name, family)
        for name in ("forward", "features", "relations")
        for family in ("llama", "gpt2", "bert")
    ),
    *zip(("reverse", "js", "labels", "on-policy"), ("bert", "gpt2", "llama", "gpt2"), strict=True),
    *zip(
        ("hidden", "last", "attention", "distance", "angle"),
        ("llama", "gpt2", "gpt2", "gpt2", "bert"),
        strict=True,
    ),
    *zip(("maps", "tokens", "all"), ("bert", "llama", "gpt2"), strict=True),
]
"""Each method on each kind of model, each of its losses on one."""


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_each_method_lowers_what_it_minimizes(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher, student = folders[family], folders[f"{family} student"]
    step = STEPS[name].model_copy(update={"teacher": str(teacher)})
    result = compress(str(student), [step], tmp_path / "d", **QUICK)
    assert result.report["verification"]["ok"]
    assert value(step, tmp_path / "d", teacher) < 0.9 * value(step, student, teacher)
    before, after = tensors(student), tensors(tmp_path / "d")  # projections leave no trace
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_the_losses_combine_with_their_weights() -> None:
    model, teacher, tokens = tiny_model("gpt2", 1), tiny_model("gpt2"), windows()

    def loss(**weights: Any) -> torch.Tensor:
        with torch.no_grad():
            return Response(**weights).criterion(model, teacher, tokens)[0](model, tokens)

    inside = {"hidden": 3.0, "attention_maps": 2.0, "attention": 5.0, "token_distance": 7.0, "distance": 11.0}
    whole = loss(response=0.5, alpha=0.25, divergence="js", **inside)
    parts = [weight * loss(response=0, **{name: 1.0}) for name, weight in inside.items()]
    torch.testing.assert_close(whole, 0.5 * loss(alpha=0.25, divergence="js") + sum(parts))
    assert len({round(float(part), 6) for part in parts}) == len(parts)


def test_tokens_are_related_in_runs_without_padding() -> None:
    model, teacher = tiny_model("bert", 1), tiny_model("bert")
    tokens = torch.randint(5, 512, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 35:] = False
    comparison = Response(token_angle=1, response=0).comparison(model, teacher, (tokens, tokens))
    with torch.no_grad():
        seen = [v.of(m, tokens) for v, m in zip(comparison.views, (model, teacher), strict=True)]
        found = comparison.losses(*seen, mask)[0]
    states = [one.given[0] for one in seen]
    groups = [(0, 0, 32), (0, 32, 40), (1, 0, 32), (1, 32, 35)]
    total = count = 0.0
    for window, begin, end in groups:
        n = end - begin
        pair = [x[window : window + 1, begin:end] for x in states]
        total += n * (n - 1) * (n - 2) * float(losses.angles(*pair))
        count += n * (n - 1) * (n - 2)
    assert float(found) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(("name", "family"), [("features", "gpt2"), ("relations", "bert")])
def test_a_student_of_fewer_blocks_in_one_recipe(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    base, fewer, step = folders[family], PruneLayers(drop=(1,)), STEPS[name].model_copy(update=GENTLE)
    compress(str(base), [fewer], tmp_path / "s", **QUICK)
    compress(str(base), [fewer, step], tmp_path / "d", **QUICK)
    assert value(step, tmp_path / "d", base) < 0.9 * value(step, tmp_path / "s", base)
    compress(str(tmp_path / "s"), [step], tmp_path / "again", **QUICK)  # the teacher: from its report
    weights = [tensors(tmp_path / folder) for folder in ("d", "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("layer_map", ["uniform", "last"])
def test_layer_maps(layer_map: Any) -> None:
    step = Features(layer_map=layer_map)
    assert step._mapped(3, 12) == {"uniform": [3, 7, 11], "last": [9, 10, 11]}[layer_map]
    assert step._mapped(4, 4) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="has 5 blocks and the teacher 4"):
        step._mapped(5, 4)


def test_the_student_does_not_drop_out(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that the teacher's hidden states do not have: with GPT-2's, a third of what is gained was lost."""

    def forward(self: Any, x: Any) -> Any:
        assert not self.training
        return x

    monkeypatch.setattr(nn.Dropout, "forward", forward)
    for name in ("forward", "features"):
        step = STEPS[name].model_copy(update={"teacher": str(folders["gpt2"]), "max_steps": 2})
        compress(str(folders["gpt2 student"]), [step], tmp_path / name, **QUICK)


@pytest.mark.parametrize("cached", [None, 512])
def test_a_teacher_with_a_padded_vocabulary_teaches_the_tokens(
    cached: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of one family, small and large models often have the same tokens and embeddings of different sizes."""
    padded = save_tiny("llama", tmp_path / "padded", vocab_size=544)
    step = Response(teacher=str(padded), cached_logits=cached, **FAST)
    compress(str(folders["llama student"]), [step], tmp_path / "out", **QUICK)
    teacher, tokens = whole(padded), windows()
    with torch.no_grad():
        before, after = (
            float(losses.divergence(whole(folder)(tokens).logits, teacher(tokens).logits[..., :512]))
            for folder in (folders["llama student"], tmp_path / "out")
        )
    assert after < 0.95 * before


def test_a_teacher_of_other_tokens_is_refused_whatever_its_size(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other")
    path = other / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(stored))
    recipe = Recipe(steps=(Response(teacher=str(other), **FAST),), **QUICK)
    with pytest.raises(UserError, match=r"other tokens than .* \(512 and 512; token 30\d"):
        prepare(str(folders["llama student"]), recipe)


def with_a_token_more(folder: Path, token: str, width: int) -> Path:
    """The tiny llama of that many embeddings, whose tokenizer has a token added behind the others."""
    made = save_tiny("llama", folder, 1, vocab_size=width)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(made)
    return made


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["labels", "cached", "on-policy"])
def test_a_token_more_that_the_text_does_not_have_is_left_out(
    name: str, side: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain, more = folders["llama"], with_a_token_more(tmp_path / "more", "<tool>", 513)
    student, teacher = (more, plain) if side == "student" else (plain, more)
    step = Response(cached_logits=64, **FAST) if name == "cached" else STEPS[name]
    if name == "on-policy":
        step = step.model_copy(update={"on_policy": 1.0})
    compress(str(student), [step.model_copy(update={"teacher": str(teacher)})], tmp_path / "out", **QUICK)
    tokens, taught = windows(), whole(teacher)
    with torch.no_grad():
        before, after = (
            float(losses.divergence(whole(f)(tokens).logits[..., :512], taught(tokens).logits[..., :512]))
            for f in (student, tmp_path / "out")
        )
    assert after < 0.95 * before
    assert tensors(tmp_path / "out")["lm_head.weight"].shape[0] == (513 if side == "student" else 512)


def test_a_token_more_that_the_text_has_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    plain, word = folders["llama"], with_a_token_more(tmp_path / "word", " the ", 544)
    for student, teacher, why in (
        (word, plain, "the text has a token beyond the 512 of both"),
        (plain, word, "the text is other ids to it"),
        (word, save_tiny("llama", tmp_path / "padded", vocab_size=544), "the text is other ids to it"),
    ):
        with pytest.raises(
            UserError, match=rf"other tokens than .*' the ', is one that differs\), and {why}"
        ):
            prepare(str(student), Recipe(steps=(Response(teacher=str(teacher), **FAST),), **QUICK))


def test_an_id_of_two_tokens_is_refused_whatever_the_text(folders: dict[str, Path], tmp_path: Path) -> None:
    one, other = (with_a_token_more(tmp_path / token, f"<{token}>", 513) for token in ("tool", "call"))
    with pytest.raises(UserError, match=r"token 512, '<tool>', is one that differs\): a teacher"):
        prepare(str(one), Recipe(steps=(Response(teacher=str(other), **FAST),), **QUICK))


@pytest.mark.parametrize("name", ["features", "on-policy"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    update = {"teacher": str(folders["llama"]), "save_steps": 4, "validation": 0.25}
    steps = [STEPS[name].model_copy(update=update)]
    student = str(folders["llama student"])
    compress(student, steps, tmp_path / "unbroken", **QUICK)

    with killed_at_training_step(6, monkeypatch):
        compress(student, steps, tmp_path / "killed", **QUICK)
    compress(student, steps, tmp_path / "killed", **QUICK)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("unbroken", "killed")]
    assert weights[0] == weights[1]


# --- encoders without a head, bad input ---------------------------------------------------------------------


def test_a_teacher_that_predicts_nothing_or_something_else(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = tiny_model("bert", 0)
    for name, model in (("masked", bert), ("headless", bert.bert)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    save_classifier("bert", tmp_path / "classifier")

    def refused(student: Path, teacher: str, message: str) -> None:
        step = Response(teacher=str(tmp_path / teacher), **FAST)
        with pytest.raises(UserError, match=message):
            prepare(str(student), Recipe(steps=(step,), **QUICK))

    refused(tmp_path / "masked", "headless", "the teacher, a BertModel, predicts none from one text")
    refused(tmp_path / "masked", "classifier", "the teacher, a BertForSequenceClassification, predicts none")
    refused(
        folders["llama student"],
        "masked",
        "is a masked language model .* a causal one .* name a causal teacher",
    )


@pytest.mark.parametrize(
    "step", [Relations(response=0, **FAST), Features(response=0, **FAST)], ids=["r", "f"]
)
def test_an_encoder_without_a_head(step: Any, tmp_path: Path) -> None:
    """A model of embeddings alone, as sentence encoders are."""
    for seed, name in enumerate(("teacher", "student")):
        tiny_model("bert", seed).bert.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    step = step.model_copy(update={"teacher": str(tmp_path / "teacher")})
    compress(str(tmp_path / "student"), [step], tmp_path / "d", **QUICK)
    paths = [tmp_path / name for name in ("d", "student", "teacher")]
    assert value(step, paths[0], paths[2]) < 0.9 * value(step, paths[1], paths[2])
    asked = type(step)(**FAST)
    with pytest.raises(UserError, match=r"weighs a distribution over tokens, and BertModel gives none"):
        prepare(str(tmp_path / "student"), Recipe(steps=(asked,), **QUICK))


@pytest.mark.parametrize(
    ("family", "steps", "message"),
    [
        ("llama", [Response()], "distilled from itself: name the uncompressed model with --teacher.$"),
        ("llama", [RTN(), Features()], "distill --method features cannot train packed weights"),
        (
            "bert",
            [Response(alpha=0.5)],
            "alpha 0.5 asks for the next token, and BertForMaskedLM is no causal",
        ),
        ("bert", [Response(on_policy=0.5)], "on_policy 0.5 asks for text that the student writes"),
        ("llama", [Features(relation_heads=3)], "relation_heads 3 does not divide .* a divisor of 32 does"),
        ("llama", [Relations(teacher="OTHER")], "vocabulary of 320 tokens"),
        (
            "llama student",
            [Response(attention_maps=1, teacher="llama")],
            "block 0 of the student has 2 heads where the teacher has 4: take attention",
        ),
        (
            "gemma2",
            [PruneLayers(drop=(1,)), Response(attention_maps=1)],
            "Gemma2ForCausalLM, runs on 'eager'",
        ),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    family: str, steps: list[Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other", vocab_size=320)
    places = {**folders, "OTHER": other, "gemma2": tmp_path / "gemma2"}
    if family == "gemma2":
        save_tiny("gemma2", places["gemma2"])
    named = [(step, getattr(step, "teacher", "")) for step in steps]
    steps = [step.model_copy(update={"teacher": str(places[name])}) if name else step for step, name in named]
    with pytest.raises(UserError, match=message):
        prepare(str(places[family]), Recipe(steps=tuple(steps), **QUICK))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Response, {"beta": 0.1}, "beta is for divergence js, not forward"),
        (Response, {"alpha": 0}, "greater than 0"),
        (Response, {"divergence": "backward"}, "'forward', 'reverse' or 'js'"),
        (Features, {"hidden": 0, "attention": 0}, "use method response"),
        (Relations, {"distance": 0, "angle": 0}, "use method response"),
        (Response, {"response": 0}, "there is nothing to learn"),
        (Features, {"response": 0, "alpha": 0.5}, "alpha is about the response, whose weight is 0"),
        (
            Response,
            {"hidden": 1, "cached_logits": 8},
            "cached_logits spares the teacher, whose inside hidden",
        ),
        (Response, {"relation_heads": 3}, "relation_heads splits what attention compares"),
        (Response, {"attention": 1, "layer_map": "last"}, "layer_map last pairs blocks for hidden"),
        (Relations, {"batch_size": 2}, "a batch_size of 2 makes no such relation; 3 does"),
        (
            Relations,
            {"processes": 2, "validation": 0.2},
            "several processes validate by one sample at a time",
        ),
    ],
)
def test_fields_that_cannot_be(cls: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cls(**fields)


def test_the_plan_knows_what_comparing_takes(folders: dict[str, Path]) -> None:
    def peak(seq_len: int, **weights: Any) -> int:
        step = Response(teacher=str(folders["bert"]), batch_size=4, **weights)
        text = {"calibration": Calibration(num_samples=4, seq_len=seq_len), "evaluation": None}
        return prepare(str(folders["bert student"]), Recipe(steps=(step,), **text)).plan.peak_memory

    maps = 4 * 4 * 3 * 4 * 256**2  # bytes of the scores of a batch: 4 windows, 3 blocks of 4 heads
    assert peak(256, attention_maps=1) - peak(256) > 3 * maps
    assert peak(256, token_angle=1) - peak(256) > 4 * 4 * 256 * 32 * 64


def test_what_only_the_teacher_shows_is_refused_before_weights_are_read(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    student, teacher = str(folders["llama"]), str(folders["llama student"])
    with pytest.raises(UserError, match="3 blocks and the teacher 2"):
        prepare(student, Recipe(steps=(Features(teacher=teacher, **FAST),), **QUICK))
    with pytest.raises(UserError, match="a divisor of 16 does"):
        step = Features(teacher=teacher, hidden=0, relation_heads=32, **FAST)
        prepare(student, Recipe(steps=(step,), **QUICK))
    with pytest.raises(UserError, match="validation 0.7 holds out 3 of 4 windows, and 1 are too few"):
        step = Relations(teacher=student, validation=0.7, **FAST)
        of_four = {**QUICK, "calibration": Calibration(num_samples=4, seq_len=32)}
        prepare(teacher, Recipe(steps=(step,), **of_four))
    with pytest.raises(UserError, match="holds out 1 of 8 windows, and relations compares 3 with each other"):
        prepare(teacher, Recipe(steps=(Relations(teacher=student, validation=0.1, **FAST),), **QUICK))
    save_tiny("llama", tmp_path / "short", max_position_embeddings=24)
    with pytest.raises(UserError, match="seq_len 32 is more than the 24 positions of the teacher"):
        prepare(student, Recipe(steps=(Response(teacher=str(tmp_path / "short"), **FAST),), **QUICK))
    with pytest.raises(UserError, match="distilled from itself"):
        named = str(Path(teacher) / ".." / Path(student).name)
        prepare(student, Recipe(steps=(Response(teacher=named, **FAST),), **QUICK))
    few = {**QUICK, "calibration": Calibration(num_samples=2, seq_len=32)}
    with pytest.raises(
        UserError, match="relations needs 3 windows or more to train on, and the text gives 2"
    ):
        compress(student, [Relations(teacher=teacher, **FAST)], tmp_path / "c", **few)
