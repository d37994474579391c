"""Language models and others as they are published, accelerated in two lines, held to plain loops."""

import copy
import math

import pytest
import torch
from torch import nn

from fastgen import Categorical, NotCausalError, accelerate, check_causality, shift_right
from tests.sampling.other_packages import other_package

K, T, START = 11, 9, 3


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.register_buffer("mask", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = (one.view(b, t, self.heads, -1).transpose(1, 2) for one in self.qkv(x).split(width, 2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.attention, self.second = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.second(x))


class SmallGPT(nn.Module):
    """As language models are commonly written, for instance minGPT: tokens -> (logits of the next token, loss)."""

    def __init__(self, width=16, layers=2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(K, width), nn.Embedding(T, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, K, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, idx, targets=None):
        places = torch.arange(idx.shape[1], dtype=torch.long, device=idx.device).unsqueeze(0)
        x = self.tokens(idx) + self.places(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None
        if targets is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, K), targets.view(-1), ignore_index=-1)
        return logits, loss


def small_gpt():
    return SmallGPT().eval(), lambda out: out[0]


def gpt2():
    transformers = other_package("transformers")
    sizes = {"vocab_size": K, "n_positions": T, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=START, eos_token_id=START, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).eval(), lambda out: out.logits


def llama():
    """Rotary positions, grouped keys, gated units."""
    transformers = other_package("transformers")
    sizes = {"vocab_size": K, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": T}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=START, eos_token_id=START, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval(), lambda out: out.logits


MODELS = {"GPT-2 of transformers": gpt2, "Llama of transformers": llama, "a GPT that returns its loss": small_gpt}


@torch.no_grad()
def generated(model, output, noise, prompt):
    """The usual loop: the tokens so far go in, the last logits come out."""
    tokens = torch.full((len(noise), 1), START)
    for t in range(noise.shape[1]):
        cumulative = output(model(tokens))[:, -1].double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, noise[:, t : t + 1].double(), right=True)
        tokens = torch.cat((tokens, prompt[:, t : t + 1] if t < prompt.shape[1] else drawn), 1)
    return tokens[:, 1:]


@pytest.mark.parametrize("backend", ["auto", "eager", "naive", "fixed_point"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models_in_two_lines(name, backend):
    model, output = MODELS[name]()
    noise = torch.rand(3, T)
    sampler = accelerate(
        model, (T,), distribution=Categorical(K, "BTK"), output=output, encode=shift_right(START), backend=backend
    )
    tokens = sampler.sample(3, noise=noise)
    assert torch.equal(tokens, generated(model, output, noise, torch.empty(3, 0).long()))
    assert tokens.unique().numel() > 4
    if backend in ("auto", "eager"):
        assert sampler.stats.redrawn == 0 and sampler.stats.error < 1e-5 and sampler.work_ratio < 1.01


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_any_length_take_one_analysis(name, monkeypatch):
    model, output = MODELS[name]()
    sampler = accelerate(model, (T,), distribution=Categorical(K, "BTK"), output=output, encode=shift_right(START))
    monkeypatch.setattr("fastgen.sampling.backends.build_engine", None)
    noise = torch.rand(3, T)
    for length in (1, 4, T - 1, T, 2):
        prompt = torch.randint(K, (3, length))
        known = nn.functional.pad(prompt, (0, T - length))
        tokens = sampler.sample(3, noise=noise, known=known, known_mask=torch.arange(T) < length)
        assert torch.equal(tokens, generated(model, output, noise, prompt))


@pytest.mark.parametrize("name", MODELS)
def test_a_leak_of_the_next_token_says_how_to_shift(name):
    model, output = MODELS[name]()
    with pytest.raises(NotCausalError, match=r"encode=fastgen\.shift_right\(start\)"):
        accelerate(model, (T,), distribution=Categorical(K, "BTK"), output=output)


class Untraced(SmallGPT):
    def forward(self, idx):
        return super().forward(torch.tensor(idx.tolist()))


def test_other_leaks_have_no_such_hint():
    class Bidirectional(SmallGPT):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.attention.mask.fill_(1)

    for model, hinted in ((Bidirectional(), False), (Untraced(), True)):
        with pytest.raises(NotCausalError) as caught:
            accelerate(model.eval(), (T,), distribution=Categorical(K, "BTK"), output=lambda out: out[0])
        assert ("shift_right" in str(caught.value)) == hinted
    assert "shift_right" not in str(check_causality(nn.Conv2d(1, 2, 1), (1, 3, 3)))


def test_shift_right():
    assert shift_right(7)(torch.tensor([[1, 2, 3]])).tolist() == [[7, 1, 2]]
    assert shift_right(7)(torch.tensor([[[1, 2], [3, 4]]])).tolist() == [[[7, 1], [2, 3]]]
    assert shift_right(0.5)(torch.tensor([[1.0, 2.0]])).tolist() == [[0.5, 1.0]]
    for wrong in (None, "x", True):
        with pytest.raises(TypeError, match="start must be a number"):
            shift_right(wrong)
    with pytest.raises(ValueError, match="shift_right is for sequences"):
        shift_right(0)(torch.zeros(1, 3, 2, 2).long())


class Captioned(nn.Module):
    """A grid of codes under a text of any length, or one that is padded, as nn.Transformer has it."""

    def __init__(self):
        super().__init__()
        self.codes, self.places, self.out = nn.Embedding(K, 8), nn.Parameter(torch.randn(T, 8)), nn.Linear(8, K)
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x, text, padding=None):
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        hidden = self.codes(x.flatten(1)) + self.places
        mixed = self.decoder(hidden, text, tgt_mask=mask, memory_key_padding_mask=padding)
        return 4 * self.out(mixed).unflatten(1, x.shape[1:])


def test_padded_texts_of_any_length_take_one_analysis(monkeypatch):
    model, longest = Captioned().eval(), 6
    options = {"distribution": Categorical(K, "BHWK"), "encode": shift_right(0)}
    blank = torch.zeros(1, longest, 8), torch.zeros(1, longest, dtype=torch.bool)
    sampler = accelerate(model, (3, 3), condition=blank, **options)
    naive = accelerate(model, (3, 3), condition=blank[0], backend="naive", **options)
    monkeypatch.setattr("fastgen.sampling.backends.build_engine", None)
    noise = torch.rand(2, 3, 3)
    for length in (2, 6, 3, 1):
        text = 3 * torch.randn(2, length, 8)
        padded = nn.functional.pad(text, (0, 0, 0, longest - length))
        padding = (torch.arange(longest) >= length).expand(2, -1)
        codes = sampler.sample(2, noise=noise, condition=(padded, padding))
        assert torch.equal(codes, naive.sample(2, noise=noise, condition=text))
        assert sampler.stats.backend in ("compiled", "eager") and sampler.stats.redrawn == 0


class OneSize(nn.Module):
    """Keeps the state of `batch` sequences, and takes no other number, as exported models do."""

    def __init__(self, batch, conditioned):
        super().__init__()
        self.any_number = False
        self.gpt, self.class_of = SmallGPT(), nn.Embedding(4, K) if conditioned else None
        self.register_buffer("state", 0.1 * torch.randn(1, K).expand(batch, K).clone(), persistent=False)

    def forward(self, idx, label=None):
        assert self.any_number or len(idx) == len(self.state), f"expected {len(self.state)} rows, got {len(idx)}"
        logits = self.gpt(nn.functional.pad(idx[:, :-1], (1, 0)))[0] + self.state.unsqueeze(1)
        return logits if label is None else logits + self.class_of(label).unsqueeze(1)


@pytest.mark.parametrize("backend", ["auto", "eager", "naive", "fixed_point"])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_models_that_take_one_number_of_images_only(batch, conditioned, backend):
    model = OneSize(batch, conditioned).eval()
    any_number = copy.deepcopy(model)
    any_number.any_number, any_number.state = True, model.state[:1].clone()
    options = {"distribution": Categorical(K, "BTK"), "condition": torch.tensor([1]) if conditioned else None}
    sampler = accelerate(model, (T,), backend=backend, verify="always", **options)
    expected = accelerate(any_number, (T,), backend="naive", **options)
    condition = torch.tensor([3, 0, 1, 2, 1]) if conditioned else None
    found, nats = sampler.sample(5, seed=0, condition=condition, return_log_prob=True)
    assert torch.equal(found, expected.sample(5, seed=0, condition=condition))
    with torch.no_grad():
        params = any_number(found) if condition is None else any_number(found, condition)
    torch.testing.assert_close(nats, options["distribution"].log_prob(params, found), atol=1e-4, rtol=1e-4)
    assert f"the model takes {batch} images at a time" in sampler.explain()
    if backend in ("auto", "eager"):
        assert sampler.stats.redrawn == 0 and sampler.work_ratio < 1.01


class Repeats(nn.Module):
    """Copies a lone sequence, as by a state of three that it broadcasts to."""

    def __init__(self):
        super().__init__()
        self.gpt = SmallGPT()

    def forward(self, idx):
        logits = self.gpt(nn.functional.pad(idx[:, :-1], (1, 0)))[0]
        return logits.expand(3, -1, -1) if len(idx) == 1 else logits


def test_a_model_that_copies_a_lone_image_is_traced_beside_another():
    model, options = Repeats().eval(), {"distribution": Categorical(K, "BTK")}
    sampler = accelerate(model, (T,), **options)
    assert f"the model returns {3 * K * T} numbers for one image and {K * T} for each of two" in sampler.explain()
    assert torch.equal(sampler.sample(4, seed=0), accelerate(model, (T,), backend="naive", **options).sample(4, seed=0))


def test_errors_of_a_model_are_its_own():
    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            Fails.calls += 1
            raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        accelerate(Fails(), (1, 2, 2), distribution=Categorical(3))

    class Wrong(nn.Module):
        calls = 0

        def forward(self, x):
            Wrong.calls += 1
            return x[..., 1:]

    with pytest.raises(ValueError, match="model must return"):
        accelerate(Wrong(), (1, 2, 3), distribution=Categorical(3))
    assert Wrong.calls <= 5  # no other number of images is tried
