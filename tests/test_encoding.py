"""Tokens against plain EncodecModel.encode, one chunk at a time; and how chunks form batches."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import reference
import standin
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import encodec_tokenizer
from encodec_tokenizer import (
    MODELS,
    GpuEncoder,
    load_model,
    make_encoder,
    parse_settings,
    resolve_device,
)


def settings_of(name, *flags):
    argv = ["--model", name, "--device", "cpu", *map(str, flags)]
    return resolve_device(parse_settings(argv))


@pytest.fixture(scope="session")
def encoder(weights):
    """encoder(model's name, *flags): the script's, with the stand-in's weights, made once."""
    model = functools.cache(lambda name: load_model(settings_of(name), weights(name))[0])

    @functools.cache
    def make(name, *flags):
        settings = settings_of(name, *flags)
        model(name).set_target_bandwidth(settings.bandwidth)
        return make_encoder(model(name), settings)

    return make


def codes_of(encoder, chunks):
    """[B, C, T] -> [B, K, F]"""
    return np.stack([codes for codes, _ in encoder.encode(list(chunks))])


@functools.cache
def chunks_of(name, seconds, count, seed=5):
    spec = MODELS[name]
    audio = standin.varied_audio(spec.sample_rate, spec.channels, round(seconds * count) + 1, seed)
    flat = audio.transpose(0, 1).reshape(spec.channels, -1)
    size = round(seconds * spec.sample_rate)
    return torch.stack([flat[:, i * size : (i + 1) * size] for i in range(count)])


def plain_codes(model, chunks):
    return np.stack([reference.codes(model, chunk) for chunk in chunks])


# ------------------------------------------------------------------------ equal to plain EnCodec


@pytest.mark.parametrize("name, books", [("encodec_24khz", 32), ("encodec_48khz", 16)])
def test_codes_equal_plain_encode_at_every_bandwidth(name, books, encoder, plain):
    """A lower bandwidth keeps the first codebooks of a higher one."""
    chunks = chunks_of(name, 1.0, 3)
    theirs = plain_codes(plain(name, 24.0), chunks)
    assert theirs.shape[1] == books
    for kbps in MODELS[name].bandwidths_kbps:
        ours = codes_of(encoder(name, "--bandwidth", kbps), chunks)
        assert ours.shape[1] == books * kbps / 24
        assert reference.agreement(ours, theirs[:, : ours.shape[1]]) >= 0.999


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2401, 3333, 48_001, 48_960, 96_000])
def test_chunks_of_any_length_are_encoded_as_encodec_does(name, samples, encoder, plain):
    chunks = chunks_of(name, 96_000 / MODELS[name].sample_rate, 2)[:, :, :samples]
    ours, theirs = codes_of(encoder(name), chunks), plain_codes(plain(name), chunks)
    assert ours.shape == theirs.shape
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_silence_and_full_scale_give_the_codes_of_encodec(name, encoder, plain):
    channels = MODELS[name].channels
    extremes = torch.stack([torch.zeros(channels, 48_000), torch.ones(channels, 48_000)])
    ours = codes_of(encoder(name), extremes)
    assert ours.min() >= 0 and ours.max() < 1024
    assert reference.agreement(ours, plain_codes(plain(name), extremes)) >= 0.99


@pytest.mark.parametrize("name", MODELS)
def test_stand_in_tokens_spread_over_hundreds_of_values(name, encoder):
    """Without that, equal tokens would show little."""
    codes = codes_of(encoder(name), chunks_of(name, 2.0, 24))
    for book in codes.swapaxes(0, 1):
        assert len(np.unique(book)) >= 200


@pytest.mark.parametrize("avx512, onednn", [(False, True), (True, True), (False, False)])
def test_every_kind_of_cpu_gives_the_same_codes(avx512, onednn, encoder, monkeypatch):
    chunks = chunks_of("encodec_24khz", 1.0, 2)
    ours = codes_of(encoder("encodec_24khz"), chunks)
    monkeypatch.setattr(encodec_tokenizer, "AVX512", avx512)
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    other = codes_of(encoder("encodec_24khz"), chunks)
    assert reference.agreement(ours, other) >= 0.999


# Around a frame (320 samples), the shortest clip that is cut, and a piece of 75 frames.
LENGTHS = [1, 319, 320, 321, 359, 360, 640, 959, 960, 961, 15_999, 16_000, 16_001]
LENGTHS += [24_000, 24_001, 48_000, 48_001, 71_999]


def test_whole_clips_of_any_length_equal_plain_encode(encoder, plain):
    audio = chunks_of("encodec_24khz", 3.0, 1)[0]
    ours = list(encoder("encodec_24khz", "--whole").encode([audio[:, :n] for n in LENGTHS]))
    theirs = [reference.codes(plain("encodec_24khz"), audio[:, :n]) for n in LENGTHS]
    assert [codes.shape for codes, _ in ours] == [codes.shape for codes in theirs]
    assert reference.agreement(np.hstack([codes for codes, _ in ours]), np.hstack(theirs)) >= 0.999


# ---------------------------------------------------------------------------- the encoder for a GPU


@pytest.fixture(scope="session")
def on_gpu(weights):
    """on_gpu(model's name): the encoder for a GPU, which here runs on the CPU."""

    @functools.cache
    def make(name):
        settings = settings_of(name, "--whole", "--batch_size", 4)
        return GpuEncoder(load_model(settings, weights(name))[0], settings)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_gpus_encoder_gives_the_same_codes_alone_and_in_company(name, encoder, on_gpu):
    lengths = [1, 500, 16_001, 24_000, 40_123, 52_000]
    chunks = [chunks_of(name, 3.0, 1)[0][:, :length] for length in lengths]
    together = list(on_gpu(name).encode(chunks))
    ours = np.hstack([codes for codes, _ in together])
    cpus = np.hstack([codes for codes, _ in encoder(name, "--whole").encode(chunks)])
    assert reference.agreement(ours, cpus) >= 0.999
    for chunk, (codes, latents) in zip(chunks, together):
        ((codes_alone, latents_alone),) = on_gpu(name).encode([chunk])
        assert np.array_equal(codes, codes_alone) and latents.equal(latents_alone)


def test_a_gpus_sums_are_exact_and_the_same_each_time(weights):
    """PyTorch turns TF32 on for cuDNN's convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = True, True, False
    settings = settings_of("encodec_24khz")
    GpuEncoder(load_model(settings, weights("encodec_24khz"))[0], settings)
    assert not matmul.allow_tf32 and not cudnn.allow_tf32 and cudnn.deterministic


def test_few_shapes_reach_a_gpu(on_gpu, monkeypatch):
    """200 clips of 200 lengths, with five numbers of samples behind their last whole frame."""
    shapes, encoder = {"convolutions": set(), "lstm": set()}, on_gpu("encodec_24khz")

    def convolve(x):
        shapes["convolutions"].add(tuple(x.shape))
        return torch.zeros(len(x), 512, -(-x.shape[2] // 320))

    def run_lstm(x, state):
        shapes["lstm"].add(tuple(x.shape))
        return x, state

    monkeypatch.setitem(encoder.convolutions.__dict__, "forward", convolve)
    monkeypatch.setitem(encoder.lstm.__dict__, "forward", run_lstm)
    rests = [0, 1, 7, 160, 319]
    lengths = [320 * (3 + number) + rests[number % 5] for number in range(200)]
    for (codes, _), length in zip(encoder.encode([torch.zeros(1, n) for n in lengths]), lengths):
        assert codes.shape == (8, -(-length // 320))
    assert shapes["convolutions"] == {(16, 1, 77 * 320), *((16, 1, 640 + r) for r in rests[1:])}
    assert shapes["lstm"] == {(150, 4, 512)}


class Lstm(torch.nn.Module):
    """In place of cuDNN's, which asks the driver."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(512, 512))

    def forward(self, x, state):
        return x @ self.weight, state


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_on_the_side_where_it_is_needed(name, monkeypatch):
    """Fake tensors claim to be on a GPU, and refuse to meet those of the CPU."""
    settings = replace(settings_of(name), device="cuda:0")
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tuple(tensor.shape)))
    with FakeTensorMode(), torch.inference_mode():
        with torch.device("cuda:0"):
            model = encodec_tokenizer.build_model(name)
            model.encoder.model[-3].lstm = Lstm()
        for part in (model.encoder, model.quantizer):
            part.to = lambda device: None  # they are there already
        model.set_target_bandwidth(6.0)
        encoder = GpuEncoder(model, settings)
        started = encoder.start_convolving(None, [torch.zeros(model.channels, 48_000)] * 2)
        for codes, latents in encoder.quantize_batch(started):
            assert codes.shape[1] == latents.shape[1] == 150 and latents.device.type == "cpu"
        assert encoder.quantize(torch.zeros(1, 128, 150)).shape[2] == 150  # a mean of latents


# -------------------------------------------------------------------------------- what changes none


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_company_order_or_threads(name, encoder, monkeypatch):
    """Nor does a bit of the latents; codes show it only where two are nearly as near."""
    chunks = [*chunks_of(name, 0.5, 6), *chunks_of(name, 0.3, 5)]
    encoder = encoder(name)
    alone = [next(encoder.encode([chunk])) for chunk in chunks]
    for threads in (1, 3):
        monkeypatch.setattr(encodec_tokenizer.CpuEncoder, "threads", threads)
        for order in (range(11), range(10, -1, -1), [3], [6, 1, 9, 4]):
            found = list(encoder.encode([chunks[i] for i in order]))
            assert len(found) == len(order)
            for i, (codes, latents) in zip(order, found):
                assert np.array_equal(codes, alone[i][0]) and latents.equal(alone[i][1])
