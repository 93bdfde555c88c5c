"""Blocks compiled one by one: the same losses and gradients, few graphs, and a way back."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch._dynamo.utils import counters

from dpo_cli.distributed.fsdp import full_tensor, make_mesh, reshard, shard
from dpo_cli.model import forward
from dpo_cli.model.adapters.active import adapter_as
from dpo_cli.model.attention import interface
from dpo_cli.model.blocks import BLOCKS, compile_blocks
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.model.recompute import recompute_blocks
from dpo_cli.session import models
from small_models import FAMILIES, build, examples, gradients, packed, packed_loss
from small_runs import metrics, train
from varlen_on_cpu import register

LAYERS = 2
SHAPES = {
    "gpt2": FAMILIES["gpt2"] | {"n_layer": LAYERS},
    **{
        family: FAMILIES[family] | {"num_hidden_layers": LAYERS, "head_dim": 8}
        for family in ("llama", "gemma2", "mistral")
    },
}
register()


@pytest.fixture
def graphs(monkeypatch):
    """The compiler without its code generator, which would take longer."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **o: real(f, backend="aot_eager", **o))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


def model_of(family, kernel="varlen"):
    model = build(family, SHAPES[family]).float().train()
    fuse_gelu(model)
    interface.use_kernel(model, kernel)
    return model


def refuse(line):
    raise AssertionError(line)


def rows():
    """Three lengths; the compiler would make a constant of a size that is 1."""
    return [packed(r) for r in (examples(2), examples(2)[1:], [*examples(2), *examples(2)])]


def step(model, row):
    """Loss and gradients in bf16, as on CUDA."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, values = packed_loss(model, row)
    return [loss.detach(), values, *gradients(model, loss).values()]


def assert_near(found, expected, tolerance=2e-2):
    assert len(found) == len(expected)
    scale = max(x.norm() for x in expected[2:])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + 0.05 * scale)


@pytest.mark.parametrize(
    ("family", "every"),
    [
        ("gpt2", 0),
        ("llama", 0),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
        pytest.param("mistral", 1, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_all_layers_and_lengths(graphs, family, every):
    expected = [step(model_of(family), row) for row in rows()]
    model = model_of(family)
    if every:
        recompute_blocks(model, every)
    compile_blocks(model, refuse)
    for row, truth in zip(rows(), expected, strict=True):
        assert_near(step(model, row), truth)
    # A block that is run again has a graph of its own: what it saves goes through hooks.
    assert graphs() == (2 if every == 2 else 1, 0)


def test_attention_that_cannot_be_traced_is_called_between_graphs(graphs):
    """The CPU's: the number of its groups differs from row to row."""
    rows_ = [packed(examples(2)), packed(examples(2) * 3), packed(examples(4))]
    expected = [step(model_of("gpt2", "grouped"), row) for row in rows_]
    model = model_of("gpt2", "grouped")
    compile_blocks(model, refuse)
    for row, truth in zip(rows_, expected, strict=True):
        assert_near(step(model, row), truth)
    count, _ = graphs()
    for row in rows_:
        step(model, row)
    assert graphs()[0] == count <= 6


def test_one_graph_for_each_kind_of_layer(graphs, monkeypatch):
    """Gemma 2's layers take turns in having a window. Its soft-capping is not this kernel's."""
    monkeypatch.setitem(SHAPES["gemma2"], "attn_logit_softcapping", None)
    model = model_of("gemma2")
    compile_blocks(model, refuse)
    for row in rows():
        step(model, row)
    assert graphs() == (2, 0)


@pytest.mark.parametrize("family", ["gpt2"])
def test_the_reference_runs_the_policys_own_code(graphs, family):
    """Bit for bit, so that the first loss of DPO is ln 2."""
    model = model_of(family)
    compile_blocks(model, refuse)
    row = rows()[0]
    with torch.autocast("cpu", torch.bfloat16):
        policy = forward.token_logprobs(model, row).detach()
        with torch.no_grad():
            reference = forward.token_logprobs(model.eval(), row)
    assert torch.equal(policy, reference)
    assert not reference.requires_grad
    assert graphs()[0] <= 2  # training and evaluation
    for other in rows():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            forward.token_logprobs(model, other)
    assert graphs()[0] <= 2


@pytest.mark.slow
def test_switching_adapters_off_compiles_once_more(graphs):
    peft = pytest.importorskip("peft")

    def adapted():
        model = model_of("llama").requires_grad_(False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules="all-linear"), model, "default"
        )
        return model

    expected = [step(adapted(), row) for row in rows()]
    model = adapted()
    compile_blocks(model, refuse)
    for row, truth in zip(rows(), expected, strict=True):
        assert_near(step(model, row), truth)
    for row in rows():
        with torch.autocast("cpu", torch.bfloat16):
            policy = forward.token_logprobs(model.train(), row).detach()
            with torch.no_grad(), adapter_as(model.eval(), None):
                reference = forward.token_logprobs(model, row)
        assert (policy - reference).abs().max() < 1e-2  # a new adapter changes nothing
    count, breaks = graphs()
    assert (count <= 3, breaks) == (True, 0)
    for row in rows():
        step(model.train(), row)
    assert graphs() == (count, 0)


@pytest.fixture
def one_rank():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_mesh("cpu", 1, 1, "full")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])
def test_sharded_blocks_compile_inside_their_hooks(graphs, one_rank, every):
    def figures(model, row):
        with torch.autocast("cpu", torch.bfloat16):
            loss, values = packed_loss(model, row)
        loss.backward()
        reshard(model)
        grads = {n: full_tensor(p.grad) for n, p in model.named_parameters()}
        model.zero_grad()
        return [loss.detach(), values, *(grads[name] for name in sorted(grads))]

    truth = model_of("llama")
    expected = [figures(truth, row) for row in rows()]
    model = model_of("llama")
    if every:
        recompute_blocks(model, every)
    compile_blocks(model, refuse)
    shard(model, one_rank, torch.bfloat16)
    for row, values in zip(rows(), expected, strict=True):
        assert_near(figures(model, row), values)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            forward.token_logprobs(model, row)
    count, breaks = graphs()
    assert (count <= 2, breaks) == (True, 0)


def test_compiled_blocks_add_nothing_to_what_is_saved_and_sample_eagerly(graphs):
    model = model_of("gpt2")
    names = list(model.state_dict())
    compile_blocks(model, refuse)
    assert list(model.state_dict()) == names
    with torch.no_grad(), interface.attention_as(model.eval(), "sdpa"):
        model(input_ids=torch.arange(5)[None], use_cache=True)
    assert graphs() == (0, 0)


def test_what_does_not_compile_runs_eagerly_and_says_so(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction\nsecond line")

    real, notes = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, options, **o: real(f, backend=broken, **o))
    torch._dynamo.reset()
    expected = step(model_of("llama"), rows()[0])
    model = model_of("llama")
    compile_blocks(model, notes.append)
    for _ in range(2):
        for a, b in zip(step(model, rows()[0]), expected, strict=True):
            assert torch.equal(a, b)
    assert len(notes) == 1
    assert notes[0].startswith("hardware.compile=blocks: falling back to eager blocks: ")
    assert "no such instruction" in notes[0]
    torch._dynamo.reset()


@pytest.mark.parametrize("off", ["value", "gradient"])
def test_wrong_code_is_refused(monkeypatch, off):
    """A compiler that scales results, or gradients alone."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.1 if off == "value" else x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    monkeypatch.setattr(torch, "compile", lambda f, **o: lambda *a, **k: Wrong.apply(f(*a, **k)))
    expected, notes = step(model_of("llama"), rows()[0]), []
    model = model_of("llama")
    compile_blocks(model, notes.append)
    for a, b in zip(step(model, rows()[0]), expected, strict=True):
        assert torch.equal(a, b)
    assert len(notes) == 1
    assert "differs by" in notes[0]


def test_running_out_of_memory_is_not_a_failure_of_the_compiler(monkeypatch):
    def short(function, **options):
        def run(*args, **kwargs):
            raise torch.OutOfMemoryError("16 GiB")

        return run

    monkeypatch.setattr(torch, "compile", short)
    model = model_of("llama")
    compile_blocks(model, refuse)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step(model, rows()[0])
    assert getattr(model, BLOCKS).failure is None


@pytest.mark.parametrize(("kernel", "why"), [("dense", "attention=dense"), ("plain", "plain")])
def test_kernels_without_packed_blocks_are_told(kernel, why):
    model, notes = model_of("gpt2", kernel), []
    compile_blocks(model, notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("hardware.compile=blocks: has no effect with ")
    assert why in notes[0]
    assert forward.computed_by(model) == kernel


def test_the_reference_knows_how_it_was_computed(graphs):
    """Cached log-probabilities of one kernel are not those of another, in their last digits."""
    model = model_of("gpt2")
    assert forward.computed_by(model) == "varlen"
    compile_blocks(model, refuse)
    assert forward.computed_by(model) == "varlen compiled"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
def test_generated_code_computes_the_same(monkeypatch, tmp_path):
    """One layer, which compiles in seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setitem(SHAPES, "gpt2", SHAPES["gpt2"] | {"n_layer": 1})
    torch._dynamo.reset()
    model, row = model_of("gpt2", "sdpa"), packed(examples(2))
    expected = [packed_loss(model, row)]
    expected.append(gradients(model, expected[0][0]))
    compile_blocks(model, refuse)
    loss, values = packed_loss(model, row)
    torch.testing.assert_close(values, expected[0][1], rtol=0, atol=1e-5)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert getattr(model, BLOCKS).failure is None
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("word", "compiled"),
    [("none", 0), ("false", 0), ("auto", 0), ("blocks", 1), ("true", 1)],
)
def test_a_run_compiles_if_told_to(tmp_path, monkeypatch, word, compiled):
    found = []
    monkeypatch.setattr(models, "compile_blocks", lambda model, note: found.append(model))
    train(tmp_path / "a", "stage=sft", "train.max_steps=1", f"hardware.compile={word}")
    assert len(found) == compiled


@pytest.mark.parametrize(
    ("choice", "device", "steps", "expected"),
    [
        ("auto", "cuda", None, True), ("auto", "cuda", 100, True), ("auto", "cuda", 99, False),
        ("auto", "cpu", None, False), ("blocks", "cpu", 1, True), ("none", "cuda", None, False),
    ],
)  # fmt: skip
def test_auto_compiles_long_runs_on_a_gpu(choice, device, steps, expected):
    run = SimpleNamespace(
        config=SimpleNamespace(
            hardware=SimpleNamespace(compile=choice),
            train=SimpleNamespace(max_steps=steps, router_aux_loss_coef=0.0),
        ),
        runtime=SimpleNamespace(device=torch.device(device)),
    )
    assert models.compiles(run) is expected


@pytest.mark.slow
def test_whole_runs_start_at_ln_2_and_learn_the_same(tmp_path, graphs):
    words = ("stage=dpo", "train.max_steps=3", "optim.lr=1e-3", "train.sample_prompts=0",
             "model.attention=sdpa")  # fmt: skip
    for choice in ("none", "blocks"):
        train(tmp_path / choice, *words, f"hardware.compile={choice}")
    eager, ours = (
        [row["loss"] for row in metrics(tmp_path / choice) if "loss" in row]
        for choice in ("none", "blocks")
    )
    assert graphs()[0] > 0
    assert ours[0] == pytest.approx(0.693147, abs=1e-6)
    assert ours == pytest.approx(eager, abs=1e-5)
