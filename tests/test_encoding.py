"""Tokens against plain EncodecModel.encode, one chunk at a time; and how chunks form batches."""

import functools
import random
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
    GpuEncoder,
    Settings,
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


def convolved(encoder, segments):
    """What Encoder.codes takes: a future for each of the segments [C, T]."""
    futures = [Future() for _ in segments]
    for future, segment in zip(futures, segments):
        future.set_result(encoder.convolve(segment))
    return futures


def codes_of(encoder, chunks):
    """[B, C, T] -> [B, K, F], as a run does it."""
    (clip,) = encode_clips([Clip("a.wav", chunks=list(chunks))], encoder)
    return clip.codes


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


@pytest.mark.parametrize("name, kbps", CASES)
def test_codes_equal_plain_encode(name, kbps, encoder, plain):
    chunks = chunks_of(name, 2.0, 3)
    ours = codes_of(encoder(name, "--bandwidth", kbps), chunks)
    theirs = plain_codes(plain(name, kbps), chunks)
    books = round(kbps * 1000 / (750 if name == "encodec_24khz" else 1500))
    assert ours.shape == theirs.shape and ours.shape[1] == books
    assert reference.agreement(ours, theirs) >= 0.999


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2401, 3333, 24_000, 48_001, 48_960, 72_000])
def test_chunks_of_any_length_are_encoded_as_encodec_does(name, samples, encoder, plain):
    chunks = chunks_of(name, 3.0, 2)[:, :, :samples]
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
    for k in range(codes.shape[1]):
        assert len(np.unique(codes[:, k])) >= 200


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


# ------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def gpu_encoder(weights, monkeypatch):
    """gpu_encoder(name): the path of a GPU, on the CPU: batches through the model's own encoder."""

    def make(name):
        settings = settings_of(name, "--batch_size", 8)
        monkeypatch.setattr(encodec_tokenizer, "CpuEncoder", GpuEncoder)
        return Encoder(load_model(settings, weights(name))[0], settings)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_path_of_a_gpu_gives_the_same_codes(name, encoder, gpu_encoder):
    chunks = chunks_of(name, 2.0, 4)
    ours = codes_of(encoder(name), chunks)
    on_gpu = gpu_encoder(name)
    assert isinstance(on_gpu.inner, GpuEncoder)
    assert reference.agreement(ours, codes_of(on_gpu, chunks)) >= 0.999


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
    codes = codes_of(on_gpu, chunks)
    assert sizes == [2, 2, 2, 2]
    assert reference.agreement(codes, expected) >= 0.999
    assert "out of GPU memory; the batches have 2 chunks from now on" in capfd.readouterr().err
    codes_of(on_gpu, chunks[:4])
    assert sizes[4:] == [2, 2]  # it knows the size from now on
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        codes_of(on_gpu, chunks)


# ------------------------------------------------------------------------------ company and order


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_the_place_or_company_in_a_batch(name, encoder):
    """Nor does a bit of the latents; codes show it only where two are nearly as near."""
    encoder = encoder(name, "--batch_size", 8, "--aggregate", "latent")
    futures = convolved(encoder, chunks_of(name, 1.0, 8))
    codes, latents, _ = encoder.codes(futures)
    for order in (range(7, -1, -1), [3], range(5), [6, 1]):
        ours, theirs, _ = encoder.codes([futures[i] for i in order])
        assert np.array_equal(ours, codes[list(order)])
        assert theirs.equal(latents[list(order)])


@pytest.mark.parametrize("name", MODELS)
def test_codes_do_not_depend_on_the_number_of_threads(name, encoder, monkeypatch):
    """Clips of several chunks, batches that end within a clip, and a block that ends early."""
    chunks = list(chunks_of(name, 0.5, 11))
    counts = (3, 1, 0, 5, 2)  # of a clip; none: a bad one
    alone = [codes_of(encoder(name), [chunk])[0] for chunk in chunks]
    for threads in (1, 3):
        monkeypatch.setattr(encodec_tokenizer, "THREADS", threads)
        rest = iter(chunks)
        clips = [
            Clip(f"{i}.wav", chunks=[next(rest) for _ in range(count)], ends_block=i == 3)
            for i, count in enumerate(counts)
        ]
        done = list(encode_clips(clips, encoder(name)))
        assert [0 if clip.codes is None else len(clip.codes) for clip in done] == list(counts)
        ours = [codes for clip in done if clip.codes is not None for codes in clip.codes]
        assert all(np.array_equal(a, b) for a, b in zip(ours, alone, strict=True))


class Recorder:
    """Stands in for Encoder: a segment's only code is the number that its samples have.

    It cuts chunks into segments of at most `cut` samples, and keeps the batches.
    """

    wants_latents = False

    def __init__(self, cut=10**9, **settings):
        self.cut, self.batches = cut, []
        self.settings = Settings(device="cpu", **settings)

    def segments(self, chunk):
        return list(chunk.split(self.cut, dim=1))

    def convolve(self, segment):
        return (int(segment[0, 0]), segment.shape[1]), 0.0

    def codes(self, convolved):
        features = [future.result()[0] for future in convolved]
        self.batches.append(features)
        assert len({length for _, length in features}) == 1
        return np.array([[[number]] for number, _ in features]), None, 0.0


def numbered(counts, lengths, ends):
    """Clips of so many chunks of a length; a chunk's samples are its number, and take no memory."""
    clips, number = [], 0
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        numbers = range(number, number + count)
        chunks = [torch.full((1, 1), n).expand(1, length) for n in numbers]
        clips.append(Clip(f"{i}.wav", chunks=chunks, ends_block=i in ends))
        number += count
    return clips


@pytest.mark.parametrize("seed", range(40))
def test_every_clip_comes_out_with_all_its_chunks_in_order(seed, monkeypatch):
    """Whatever the sizes of batches and chunks, the threads, and the limit of what is in flight."""
    rng = random.Random(seed)
    monkeypatch.setattr(encodec_tokenizer, "THREADS", rng.choice([1, 2, 3, 8]))
    counts = [rng.choice([0, 1, 1, 2, 5, 30]) for _ in range(rng.choice([1, 20, 50]))]
    longest = rng.choice([100, 48_000, 3_000_000])  # of the last, one clip exceeds the limit
    kinds = [rng.randint(1, longest) for _ in range(rng.choice([1, 2, 20]))]
    lengths = [rng.choice(kinds) for _ in counts]
    ends = set(range(15, 50, 16)) | {rng.randrange(50)}
    encoder = Recorder(
        cut=rng.choice([longest // 7 + 1, 10**9]),
        batch_size=rng.choice([1, 2, 4, 16, 256]),
        target_duration=rng.choice([0.1, 2.0, 60.0]),
    )
    done = list(encode_clips(numbered(counts, lengths, ends), encoder))
    assert [clip.fname for clip in done] == [f"{i}.wav" for i in range(len(counts))]
    number = 0
    for clip, count, length in zip(done, counts, lengths):
        segments = -(-length // encoder.cut)
        expected = [[[n] * segments] for n in range(number, number + count)]
        assert ([] if clip.codes is None else clip.codes.tolist()) == expected
        number += count


def test_batches_depend_on_the_block_alone(monkeypatch):
    """Not on what was encoded before it, nor, where chunks are of one length, on the threads."""
    monkeypatch.setattr(encodec_tokenizer, "THREADS", 3)
    counts, lengths = [3, 1, 0, 5, 2, 9], [7, 9, 7, 7, 8, 7]
    first, alone, both = (Recorder(batch_size=4) for _ in range(3))

    def before():
        return numbered([4, 3], [9, 7], {1})

    list(encode_clips(before(), first))
    list(encode_clips(numbered(counts, lengths, {5}), alone))
    list(encode_clips([*before(), *numbered(counts, lengths, {5})], both))
    # Threads finish the batches in any order.
    assert sorted(both.batches) == sorted(first.batches + alone.batches)
    assert sum(map(len, both.batches)) == 27

    of_threads = []
    for threads in (1, 8):
        monkeypatch.setattr(encodec_tokenizer, "THREADS", threads)
        encoder = Recorder(batch_size=4)
        list(encode_clips(numbered(counts, [7] * 6, {3, 5}), encoder))
        of_threads.append(sorted(encoder.batches))
    assert of_threads[0] == of_threads[1]
    assert [len(batch) for batch in of_threads[0]] == [4, 4, 1, 4, 4, 3]


def test_a_batch_is_closed_when_its_chunks_are_convolved(monkeypatch):
    """After as many more as there are threads; at once, a thread would wait for the others."""
    order = []

    class Immediate:
        def submit(self, function, argument):
            order.append(function.__name__)
            future = Future()
            future.set_result(function(argument))
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(encodec_tokenizer, "THREADS", 3)
    monkeypatch.setattr(encodec_tokenizer, "one_core_pool", lambda threads: Immediate())
    clips = numbered([1] * 15, [7] * 15, {14})
    assert len(list(encode_clips(clips, Recorder(batch_size=4)))) == 15
    runs = "".join({"convolve": "x", "codes": "C"}[name] for name in order)
    assert runs == "x" * 7 + "C" + "xxxxC" * 2 + "C"


def test_what_is_in_flight_is_limited_in_seconds_of_audio(monkeypatch):
    """The clips behind a limit are not taken from their reader before others have come out."""
    monkeypatch.setattr(encodec_tokenizer, "THREADS", 2)
    taken = []

    def reader(seconds):
        for clip in numbered([1] * 100, [24_000 * seconds] * 100, {99}):
            taken.append(clip)
            yield clip

    for seconds, most in ((60, 4), (10, 8), (1, 40)):
        taken.clear()
        next(iter(encode_clips(reader(seconds), Recorder(batch_size=1))))
        assert 1 < len(taken) <= most
