"""Sound files as people have them: samples equal plain soundfile's, or there is a true reason."""

import errno
import io
import os
import random
import re
import zlib

import numpy as np
import pytest
import reference
import soundfile
import torch

import encodec_tokenizer
from encodec_tokenizer import BadClip, Settings, read_audio, resample


def encoded(samples, rate, kind, subtype=None, **options):
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


def read_or_reason(path, data=None, limit_s=600):
    """The samples [C, T] of a file, or its reason as text; `data` are written to it first."""
    if data is not None:
        path.write_bytes(data)
    try:
        channels = soundfile.info(path).channels
    except (soundfile.LibsndfileError, TypeError):
        channels = 1
    try:
        return read_audio(path, channels, limit_s)[0].numpy()
    except BadClip as reason:
        assert "\n" not in str(reason) and str(path.parent) not in str(reason)
        return str(reason)


@pytest.mark.parametrize("model, channels_out", [("encodec_24khz", 1), ("encodec_48khz", 2)])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("rate", [8_000, 11_127, 22_050, 44_100, 48_000, 96_000])
def test_rates_and_channels_are_converted_as_encodec_does(
    rate, channels, model, channels_out, tmp_path, sound
):
    if (rate, channels_out) == (11_127, 2):
        pytest.skip("at 48 kHz this rate is approximated")
    path, settings = tmp_path / "a.wav", Settings(model=model, device="cpu")
    soundfile.write(path, sound(0.25, rate, channels), rate, subtype="FLOAT")
    samples, file_rate, _ = read_audio(path, channels_out, 600)
    ours = resample(samples, file_rate, settings)
    theirs = reference.load(path, encodec_tokenizer.MODELS[model].sample_rate, channels_out)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


def test_an_odd_rate_is_approximated_and_named_once(run, tmp_path, sound):
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", sound(0.05, 44_101, seed=i % 3), 44_101)
    status, _, err = run("--audio_dir", tmp_path, "--target_duration", "0.1")
    assert status == 0 and err.count("note: the sample rate 44101 Hz is met to within 0.01 %") == 1


def formats():
    for kind in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(kind):
            if kind not in ("RAW", "SD2") and soundfile.check_format(kind, subtype):
                yield kind, subtype


def test_every_format_of_libsndfile_gives_soundfiles_samples(tmp_path, sound):
    read = 0
    for kind, subtype in formats():
        for channels in (1, 2):
            path = tmp_path / f"{kind}_{subtype}_{channels}.{kind.lower()}"
            try:
                soundfile.write(path, sound(0.3, 8_000, channels), 8_000, subtype, format=kind)
                expected = soundfile.read(path, dtype="float32", always_2d=True)[0].T
            except soundfile.LibsndfileError:
                continue  # it takes no stereo, or not this rate
            ours = read_or_reason(path)
            if np.abs(expected).max() > 100:
                assert "audio lies between -1 and 1" in ours, path.name
            else:
                assert np.array_equal(ours, expected), (path.name, ours)
                read += 1
    assert read > 60


def test_a_long_file_is_read_whole_in_pieces(tmp_path):
    samples = np.linspace(-1, 1, 2**24 + 17, dtype=np.float32)[:, None].repeat(2, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    ours, _, _ = read_audio(tmp_path / "a.wav", 2, 600)
    assert np.array_equal(ours.numpy().T, samples)


# ------------------------------------------------------------------------- intact, though odd


def ogg_pages(data, change):
    """Apply `change` to each page of an OGG file, and mend its checksum (RFC 3533)."""
    mirrored = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    made = b""
    starts = [match.start() for match in re.finditer(b"OggS", data)]
    for start, end in zip(starts, [*starts[1:], None]):
        page = bytearray(data[start:end])
        change(page)
        page[22:26] = bytes(4)
        # zlib's CRC-32 has OGG's polynomial, but inverts it and takes each byte's bits in reverse.
        crc = zlib.crc32(page.translate(mirrored), 0xFFFFFFFF) ^ 0xFFFFFFFF
        page[22:26] = crc.to_bytes(4, "big").translate(mirrored)
        made += page
    return made


def no_last_flag(page):
    page[5] &= ~4


def later(page):
    """Ten minutes later in a stream."""
    at = int.from_bytes(page[6:14], "little")
    page[6:14] = (at + 28_800_000 * (at > 0)).to_bytes(8, "little")


def tag(size):
    """An ID3v2 tag with a picture of that many bytes."""
    body = b"APIC" + size.to_bytes(4, "big") + b"\0\0" + random.Random(0).randbytes(size)
    length = bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + length + body


ID3V1 = b"TAG" + bytes(range(125))
LYRICS = b"LYRICSBEGININD0000200LYR00004text000033LYRICS200" + ID3V1


def mp3_in_wav(mp3, rate):
    fmt = np.array([85, 1], "<u2").tobytes() + np.array([rate, 16_000], "<u4").tobytes()
    fmt += np.array([1, 0, 12, 1], "<u2").tobytes() + np.array([2], "<u4").tobytes()
    fmt += np.array([418, 1, 0], "<u2").tobytes()
    chunks = b"fmt " + len(fmt).to_bytes(4, "little") + fmt
    chunks += b"data" + len(mp3).to_bytes(4, "little") + mp3
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WAVE" + chunks


def unknown_length(flac):
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


ODD = {  # what it is -> its ending, the clean file's kind, and what is done to its bytes
    "MP3 with a large cover": (".mp3", "MP3", lambda data: tag(300_000) + data),
    "MP3 with an ID3v1 tag behind it": (".mp3", "MP3", lambda data: data + ID3V1),
    "MP3 with lyrics behind it": (".mp3", "MP3", lambda data: data + LYRICS),
    "OGG with bytes behind it": (".ogg", "OGG", lambda data: data + b"\0x"),
    "OGG without its last flag": (".ogg", "OGG", lambda data: ogg_pages(data, no_last_flag)),
    "FLAC with an ID3v1 tag behind it": (".flac", "FLAC", lambda data: data + ID3V1),
    "FLAC with an unknown length": (".flac", "FLAC", unknown_length),
    "WAV with a chunk behind its audio": (".wav", "WAV", lambda data: data + b"LIST\4\0\0\0junk"),
    "WAV under another ending": (".mp3", "WAV", lambda data: data),
    "WAV from a pipe": (".wav", "WAV", lambda d: d.replace(d[36:44], b"data\xff\xff\xff\xff", 1)),
}


@pytest.mark.parametrize("ending, kind, change", ODD.values(), ids=ODD)
def test_an_odd_but_intact_file_is_read_right(ending, kind, change, tmp_path, sound):
    clean = encoded(sound(1.5), 44_100, kind)
    expected = soundfile.read(io.BytesIO(clean), dtype="float32", always_2d=True)[0].T
    assert np.array_equal(read_or_reason(tmp_path / f"odd{ending}", change(clean)), expected)


def test_an_opus_stream_joined_midway_is_read_as_from_its_start(tmp_path, sound):
    clean = encoded(sound(1.5, 48_000), 48_000, "OGG", "OPUS")
    (tmp_path / "clean.opus").write_bytes(clean)
    expected = soundfile.read(tmp_path / "clean.opus", dtype="float32", always_2d=True)[0].T
    found = read_or_reason(tmp_path / "a.opus", ogg_pages(clean, later))
    assert np.array_equal(found, expected)


def test_an_mp3_inside_a_wav_is_read(tmp_path, sound):
    data = mp3_in_wav(encoded(sound(1.5), 44_100, "MP3"), 44_100)
    (tmp_path / "a.wav").write_bytes(data)
    expected = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)[0].T
    assert expected.shape[1] > 44_100
    assert np.array_equal(read_or_reason(tmp_path / "a.wav"), expected)


@pytest.mark.parametrize("unknown", ["format", "encoding"])
def test_torchaudio_reads_what_libsndfile_does_not_know(unknown, tmp_path, monkeypatch):
    data = b"\0no audio for soundfile\1" * 50
    if unknown == "encoding":
        data = encoded(np.zeros(9_000), 8_000, "CAF", "PCM_16").replace(b"lpcm", b"aac ", 1)
    decoded = torch.stack([torch.ones(8_000), torch.zeros(8_000)])
    monkeypatch.setattr("torchaudio.load", lambda path: (decoded, 16_000))
    assert (read_or_reason(tmp_path / "a.m4a", data) == 0.5).all()
    assert "too long: 0.5 s (limit 0.4 s" in read_or_reason(tmp_path / "a.m4a", limit_s=0.4)


# --------------------------------------------------------------------------------------- bad files


def bad_files(sound):
    """name -> its bytes; what its reason must say."""
    whole = encoded(sound(1.0), 44_100, "WAV", "FLOAT")
    pcm = encoded(sound(1.0), 44_100, "WAV", "PCM_16")
    page = "<!DOCTYPE html><title>404: Seite nicht verfügbar, “leider”</title>"
    absurd = {value: np.float32(value).tobytes() for value in (np.nan, np.inf)}
    return {
        "empty.wav": (b"", "empty file (0 bytes)"),
        "no_samples.wav": (encoded(np.zeros(0), 44_100, "WAV"), "no samples"),
        "truncated.wav": (whole[:-9], "176,391 of the 176,400 bytes of audio that it promises"),
        "size.wav": (pcm[:40] + len(pcm).to_bytes(4, "little") + pcm[44:], "88,200 of the 88,244"),
        "size_0.wav": (pcm[:40] + bytes(4) + pcm[44:], "its header says 0 bytes of audio"),
        "rate_0.wav": (pcm[:24] + bytes(4) + pcm[28:], "a sample rate or a number of channels of"),
        "rate.wav": (pcm[:24] + b"\xff\xff\xff\x7f" + pcm[28:], "a sample rate of 2147483647 Hz"),
        "scale.wav": (
            encoded(sound(1.0) * 32768, 44_100, "WAV", "FLOAT"),
            "audio lies between -1 and 1: divide them",
        ),
        "text.wav": (b"This is not audio." * 99, "not audio: the file holds text"),
        "page.mp3": (page.encode(), "not audio: the file holds text"),
        "page.ogg": (page.encode("utf-16"), "not audio: the file holds text"),
        "page.flac": (page.encode("utf-16-le"), "not audio: the file holds text"),
        "page.wav": (page.encode("cp1252"), "not audio: the file holds text"),
        "tag.mp3": (tag(30), "no audio behind the file's tag could be decoded"),
        "zeros.wav": (bytes(5_000), "not audio that can be read (soundfile: "),
        "audio.raw": (pcm[44:], "raw audio without a header has no sample rate"),
        **{f"{v}.wav": (whole[:-4] + end, "NaN or infinite samples") for v, end in absurd.items()},
    }


def test_every_bad_file_has_a_reason_in_plain_words(tmp_path, sound):
    for name, (data, says) in bad_files(sound).items():
        reason = read_or_reason(tmp_path / name, data)
        assert isinstance(reason, str) and says in reason, (name, reason)
        for words in ("File does not exist", "SF_INFO"):
            assert words not in reason


def test_too_long_a_file_is_refused_by_its_header(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.w64", np.zeros(18_000), 40_000)
    monkeypatch.setattr(encodec_tokenizer, "sha256_of", None)  # it is not read
    reason = read_or_reason(tmp_path / "a.w64", limit_s=0.4)
    assert reason == "too long: 0.5 s (limit 0.4 s, see --max_duration)"


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "FLAC"])
def test_each_of_100_cuts_is_refused(kind, tmp_path, sound):
    """400 in all, of the formats that promise a length: half of them where little is missing."""
    data = encoded(np.concatenate([sound(0.25), sound(0.25, seed=1)]), 44_100, kind, "PCM_16")
    chance = random.Random(kind)
    cuts = [chance.randrange(len(data)) for _ in range(50)]
    cuts += [len(data) - missing for missing in (*range(1, 11), *chance.sample(range(11, 600), 40))]
    for length in cuts:
        assert isinstance(read_or_reason(tmp_path / "a.wav", data[:length]), str), length
    assert read_or_reason(tmp_path / "a.wav", data).shape == (1, 22_050)


@pytest.mark.parametrize("kind, subtype", [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_damaged_lossy_file_gives_soundfiles_samples_or_a_reason(kind, subtype, tmp_path, sound):
    data, chance, good = encoded(sound(2.0, 48_000), 48_000, kind, subtype), random.Random(7), 0
    path = tmp_path / f"a.{kind.lower()}"
    for i in range(60):
        bad = bytearray(data[: chance.randrange(len(data))] if i % 2 else data)
        for _ in range(0 if i % 2 else 5):
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        found = read_or_reason(path, bad)
        if not isinstance(found, str):
            assert np.array_equal(found, soundfile.read(path, dtype="float32", always_2d=True)[0].T)
            good += 1
    assert 0 < good < 60


# ----------------------------------------------------------------------------- the machine at fault


@pytest.mark.parametrize("code, fault", [(2, OSError), (17, MemoryError)])
def test_libsndfiles_machine_faults_are_not_the_clips(code, fault, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"\0")

    def fail(*args, **options):
        raise soundfile.LibsndfileError(code)

    monkeypatch.setattr("encodec_tokenizer.sf.SoundFile", fail)
    with pytest.raises(fault):
        read_audio(tmp_path / "a.wav", 1, 600)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_an_io_error_that_libsndfile_hides_is_not_the_clips(kind, tmp_path, monkeypatch, sound):
    data = encoded(sound(0.5), 44_100, kind)
    (tmp_path / "a").write_bytes(data[: len(data) // 2])  # as read by libsndfile

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(encodec_tokenizer, "sha256_of", fail)
    try:
        read_audio(tmp_path / "a", 1, 600)
    except BadClip as reason:
        assert kind == "WAV" and "promises" in str(reason)  # its header alone shows it
    except OSError as error:
        assert error.errno == errno.EIO
    else:
        raise AssertionError("half a file was read")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux counts open files there")
def test_files_good_and_bad_are_all_closed(tmp_path, sound):
    kinds = [encoded(sound(0.5), 44_100, kind) for kind in ("MP3", "WAV", "OGG", "FLAC")]
    kinds += [data[: len(data) // 2] for data in kinds] + [b"text" * 99]
    before = len(os.listdir("/proc/self/fd"))
    for data in kinds * 5:
        read_or_reason(tmp_path / "a", data)
    assert len(os.listdir("/proc/self/fd")) <= before
