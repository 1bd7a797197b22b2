"""Tokens against plain EncodecModel.encode, one chunk at a time."""

import functools
import time
from concurrent.futures import Future

import numpy as np
import pytest
import reference
import standin
import torch

import encodec_tokenizer
from encodec_tokenizer import (
    MODELS,
    Clip,
    Encoder,
    WholeEncoder,
    encode_clips,
    load_model,
    parse_settings,
    resolve_device,
)

CASES = [(name, kbps) for name, spec in MODELS.items() for kbps in spec.bandwidths_kbps]


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
        return Encoder(model(name), settings)

    return make


def convolved(encoder, chunks):
    """What Encoder.codes takes: a future for each of the chunks [B, C, T]."""
    futures = [Future() for _ in chunks]
    for future, chunk in zip(futures, chunks):
        future.set_result(encoder.convolve(chunk))
    return futures


def codes_of(encoder, chunks):
    """[B, C, T] -> [B, K, F], batch by batch."""
    size, futures = encoder.inner.batch_size, convolved(encoder, chunks)
    parts = [futures[i : i + size] for i in range(0, len(futures), size)]
    return np.concatenate([encoder.codes(part)[0] for part in parts])


@functools.cache
def chunks_of(name, seconds, count, seed=5):
    spec = MODELS[name]
    audio = standin.varied_audio(spec.sample_rate, spec.channels, round(seconds * count) + 1, seed)
    flat = audio.transpose(0, 1).reshape(spec.channels, -1)
    size = round(seconds * spec.sample_rate)
    return torch.stack([flat[:, i * size : (i + 1) * size] for i in range(count)])


@pytest.fixture(scope="session")
def plain_codes(plain):
    """plain_codes(name, seconds): the chunks' codes from plain EnCodec at its highest bandwidth."""

    @functools.cache
    def make(name, seconds):
        model = plain(name, MODELS[name].bandwidths_kbps[-1])
        return np.stack([reference.codes(model, chunk) for chunk in chunks_of(name, seconds, 4)])

    return make


@pytest.mark.parametrize("name", MODELS)
def test_plain_codes_of_a_lower_bandwidth_are_the_first_codebooks(name, plain, plain_codes):
    """Residual quantization: what the next test leans on."""
    for kbps in MODELS[name].bandwidths_kbps[:-1]:
        codes = reference.codes(plain(name, kbps), chunks_of(name, 1.0, 4)[1])
        assert np.array_equal(codes, plain_codes(name, 1.0)[1, : len(codes)])


@pytest.fixture(scope="session")
def convolved_once(encoder):
    return functools.cache(
        lambda name, seconds: convolved(encoder(name), chunks_of(name, seconds, 4))
    )


@pytest.mark.parametrize("seconds", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("name, kbps", CASES)
def test_codes_equal_plain_encode(name, kbps, seconds, encoder, convolved_once, plain_codes):
    """The convolutions do not know of the bandwidth, and are made once."""
    ours, _, _ = encoder(name, "--bandwidth", kbps).codes(convolved_once(name, seconds))
    books = round(kbps * 1000 / (750 if name == "encodec_24khz" else 1500))
    theirs = plain_codes(name, seconds)[:, :books]
    assert ours.shape == theirs.shape and ours.shape[1] == books
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_stand_in_tokens_spread_over_hundreds_of_values(name, encoder):
    codes = codes_of(encoder(name), chunks_of(name, 2.0, 24))
    for k in range(codes.shape[1]):
        assert len(np.unique(codes[:, k])) >= 200


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_the_place_or_company_in_a_batch(name, encoder):
    """Nor does a bit of the latents; codes show it only where two are nearly as near."""
    encoder = encoder(name, "--batch_size", 8, "--aggregate", "latent")
    futures = convolved(encoder, chunks_of(name, 2.0, 8))
    codes, latents, _ = encoder.codes(futures)
    orders = (range(7, -1, -1), [3], range(5), [6, 1])
    for order in orders:
        ours, theirs, _ = encoder.codes([futures[i] for i in order])
        assert np.array_equal(ours, codes[list(order)])
        assert theirs.equal(latents[list(order)])


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_the_number_of_threads(name, encoder, monkeypatch):
    """Clips of several chunks, batches that end within a clip, and a block that ends early."""
    settings = settings_of(name)
    chunks = list(chunks_of(name, 0.5, 11))
    counts = (3, 1, 0, 5, 2)  # of a clip; none: a bad one
    alone = [encoder(name).codes(convolved(encoder(name), [chunk]))[0][0] for chunk in chunks]

    def clips():
        rest = iter(chunks)
        for i, count in enumerate(counts):
            yield Clip(f"{i}.wav", chunks=[next(rest) for _ in range(count)], index=60 + i)

    for threads in (1, 3):
        monkeypatch.setattr(encodec_tokenizer, "THREADS", threads)
        done = list(encode_clips(clips(), encoder(name), settings))
        assert [clip.fname for clip in done] == [f"{i}.wav" for i in range(len(counts))]
        assert [0 if clip.codes is None else len(clip.codes) for clip in done] == list(counts)
        ours = [codes for clip in done if clip.codes is not None for codes in clip.codes]
        assert all(np.array_equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_threads_do_not_wait_for_each_other_within_a_block(monkeypatch):
    """A batch's LSTM is begun when its chunks are convolved; at once it would wait for the last."""
    monkeypatch.setattr(encodec_tokenizer, "THREADS", 3)
    waited = []

    class Steady:
        def convolve(self, number):
            time.sleep(0.02)

        def codes(self, convolved):
            waited.append(not all(future.done() for future in convolved))
            return np.zeros((len(convolved), 8, 150), dtype=np.int64), None, 0.0

    clips = [Clip(f"{i}.wav", chunks=[i], index=i) for i in range(60)]
    settings = settings_of("encodec_24khz")
    assert len(list(encode_clips(clips, Steady(), settings))) == 60
    assert len(waited) == 60 // settings.batch_size
    assert sum(waited) < len(waited) / 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2401, 3333, 48_960, 48_001])
def test_chunks_of_odd_lengths_are_encoded_as_encodec_does(name, samples, encoder, plain):
    chunks = chunks_of(name, 3.0, 2)[:, :, :samples]
    ours = codes_of(encoder(name), chunks)
    theirs = np.stack([reference.codes(plain(name), chunk) for chunk in chunks])
    assert ours.shape == theirs.shape
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
def test_silence_and_full_scale_give_the_codes_of_encodec(name, encoder, plain):
    channels = MODELS[name].channels
    extremes = torch.stack([torch.zeros(channels, 48_000), torch.ones(channels, 48_000)])
    ours = codes_of(encoder(name), extremes)
    theirs = np.stack([reference.codes(plain(name), chunk) for chunk in extremes])
    assert ours.min() >= 0 and ours.max() < 1024
    assert reference.agreement(ours, theirs) >= 0.99


def test_48_khz_keeps_the_codes_of_every_segment(encoder):
    """A well-known script of this name kept only the first segment's."""
    chunks = chunks_of("encodec_48khz", 2.0, 1)
    codes = codes_of(encoder("encodec_48khz"), chunks)
    assert codes.shape == (1, 4, 150 + 150 + 3)
    changed = chunks.clone()
    changed[:, :, 60_000:] = 0.1 * torch.randn(changed[:, :, 60_000:].shape)
    other = codes_of(encoder("encodec_48khz"), changed)
    assert np.array_equal(codes[..., :150], other[..., :150])
    assert not np.array_equal(codes[..., 150:300], other[..., 150:300])


@pytest.fixture
def gpu_encoder(weights, monkeypatch):
    """gpu_encoder(name): the path of a GPU, whole batches through the model's own encoder."""

    def make(name):
        settings = settings_of(name, "--batch_size", 8)
        monkeypatch.setattr(encodec_tokenizer, "FastEncoder", WholeEncoder)
        return Encoder(load_model(settings, weights(name))[0], settings)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_path_of_a_gpu_gives_the_same_codes(name, encoder, gpu_encoder):
    """CUDA runs the model's own encoder on whole batches; here that path runs on the CPU."""
    chunks = chunks_of(name, 2.0, 4)
    ours = codes_of(encoder(name), chunks)
    on_gpu = gpu_encoder(name)
    assert isinstance(on_gpu.inner, WholeEncoder)
    theirs, _, _ = on_gpu.codes(convolved(on_gpu, chunks))
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("capability, onednn", [("AVX2", True), ("AVX512", True), ("AVX2", False)])
def test_every_kind_of_cpu_gives_the_same_codes(capability, onednn, encoder, monkeypatch):
    chunks = chunks_of("encodec_24khz", 2.0, 4)
    ours = codes_of(encoder("encodec_24khz"), chunks)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    other = codes_of(encoder("encodec_24khz"), chunks)
    assert reference.agreement(ours, other) >= 0.999


def test_out_of_memory_halves_the_batch_and_gives_the_same_codes(encoder, gpu_encoder, capfd):
    name, limit, sizes = "encodec_24khz", 3, []
    chunks = chunks_of(name, 1.0, 8)
    expected = codes_of(encoder(name), chunks)
    on_gpu = gpu_encoder(name)
    model_encoder = on_gpu.inner.encoder

    def small_gpu(batch):
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return model_encoder(batch)

    on_gpu.inner.encoder = small_gpu
    codes, _, _ = on_gpu.codes(convolved(on_gpu, chunks))
    assert sizes == [2, 2, 2, 2]
    assert reference.agreement(codes, expected) >= 0.999
    assert "going on with batches of 2 chunks" in capfd.readouterr().err
    on_gpu.codes(convolved(on_gpu, chunks[:4]))
    assert sizes[4:] == [2, 2]  # it knows the size from now on
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        on_gpu.codes(convolved(on_gpu, chunks))
