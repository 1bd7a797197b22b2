"""Sound files as people have them: samples equal plain soundfile's, or there is a true reason."""

import errno
import io
import os
import random
import re
import struct
import zlib
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import reference
import soundfile
import torch

from encodec_tokenizer import MODELS, BadClip, Settings, read_audio, resample


def encoded(samples, rate, kind, subtype=None, **options):
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


def plain(path):
    """What soundfile gives: [C, T]."""
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


def read_or_reason(path, data=None, limit_s=600):
    """The samples [C, T] of a file, or its reason as text; `data` are written to it first."""
    if data is not None:
        path.write_bytes(data)
    try:
        channels = soundfile.info(path).channels
    except (soundfile.LibsndfileError, TypeError):
        channels = 1
    try:
        return read_audio(path, channels, Settings(max_duration=limit_s))[0].numpy()
    except BadClip as reason:
        assert "\n" not in str(reason) and str(path.parent) not in str(reason)
        return str(reason)


SHAPES = [(8_000, 3), (22_050, 2), (44_100, 1), (48_000, 2), (96_000, 8)]  # Hz, channels


@pytest.mark.parametrize(
    "model, shape",
    # The old Macintosh's rate, whose filter has 2^24.8 entries, and that of a whale's song.
    [*product(MODELS, SHAPES), ("encodec_24khz", (11_127, 1)), ("encodec_24khz", (100, 1))],
)
def test_rates_and_channels_are_converted_as_encodec_does(model, shape, tmp_path, sound, capsys):
    path, spec, (rate, channels) = tmp_path / "a.wav", MODELS[model], shape
    soundfile.write(path, sound(0.25, rate, channels), rate, subtype="FLOAT")
    samples, file_rate, _ = read_audio(path, spec.channels, Settings())
    ours = resample(samples, file_rate, Settings(model=model, device="cpu"))
    theirs = reference.load(path, spec.sample_rate, spec.channels)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)
    assert capsys.readouterr().err == ""


def test_an_odd_rate_is_approximated_and_named_once(run, tmp_path, sound):
    for i in range(18):
        soundfile.write(tmp_path / f"{i}.wav", sound(0.05, 44_101, seed=i % 3), 44_101)
    status, _, err = run("--audio_dir", tmp_path, "--target_duration", "0.1")
    assert status == 0 and err.count("note: the sample rate 44101 Hz is met to within 0.01 %") == 1


def test_every_format_of_libsndfile_gives_soundfiles_samples(tmp_path, sound):
    kinds, subtypes = soundfile.available_formats(), soundfile.available_subtypes()
    read = 0
    for kind, subtype, channels in product(kinds, subtypes, (1, 2)):
        path = tmp_path / f"{subtype}_{channels}.{kind.lower()}"
        try:
            soundfile.write(path, sound(0.3, 8_000, channels), 8_000, subtype, format=kind)
            expected = plain(path)
        except (TypeError, ValueError, soundfile.LibsndfileError):
            continue  # RAW, no such pair, no stereo, or not this rate
        found = read_or_reason(path)
        if kind in ("MAT4", "MAT5"):
            assert "a MATLAB matrix, not a sound file" in found, path.name
        elif np.abs(expected).max() > 100:
            assert "audio lies between -1 and 1" in found, path.name
        else:
            assert np.array_equal(found, expected), (path.name, found)
            read += 1
    assert read > 60


def test_a_long_file_is_read_whole_in_pieces(tmp_path):
    samples = np.linspace(-1, 1, 2**24 + 17, dtype=np.float32)[:, None].repeat(2, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    ours, _, _ = read_audio(tmp_path / "a.wav", 2, Settings())
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


def mp3_in_wav(mp3):
    """It has WAVE_FORMAT_MPEGLAYER3 (mmreg.h)."""
    fmt = struct.pack("<HHIIHHHHIHHH", 85, 1, 44_100, 16_000, 1, 0, 12, 1, 2, 418, 1, 0)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(mp3))
    return b"RIFF" + struct.pack("<I", len(chunks) + len(mp3) + 4) + b"WAVE" + chunks + mp3


def unknown_length(flac):
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def patched(data, marker, skip, new):
    """A file's bytes with others at `skip` bytes from a chunk's name."""
    at = data.index(marker) + skip
    return data[:at] + new + data[at + len(new) :]


W64_LIST = bytes.fromhex("6c6973742f91cf11a5d628db04c10000") + b"\x68" + bytes(87)
ODD = {  # what it is -> its ending, the clean file's format, and what is done to its bytes
    "MP3 with a large cover": ("mp3", "MP3", lambda data: tag(300_000) + data),
    "MP3 with an ID3v1 tag behind it": ("mp3", "MP3", lambda data: data + ID3V1),
    "MP3 with lyrics behind it": ("mp3", "MP3", lambda data: data + LYRICS),
    "MP3 behind zeros": ("mp3", "MP3", lambda data: bytes(3_000) + data),
    "MP3 inside a WAV": ("wav", "MP3", mp3_in_wav),
    "OGG with bytes behind it": ("ogg", "OGG", lambda data: data + b"\0x"),
    "OGG without its last flag": ("ogg", "OGG", lambda data: ogg_pages(data, no_last_flag)),
    "Opus joined in mid-stream": ("opus", "OGG OPUS", lambda data: ogg_pages(data, later)),
    "FLAC with an ID3v1 tag behind it": ("flac", "FLAC", lambda data: data + ID3V1),
    "FLAC with an unknown length": ("flac", "FLAC", unknown_length),
    "FLAC behind an ID3v2 tag": ("flac", "FLAC", lambda data: tag(50) + data),
    "WAV with a chunk behind its audio": ("wav", "WAV", lambda data: data + b"LIST\4\0\0\0junk"),
    "WAV under another ending": ("mp3", "WAV", lambda data: data),
    "WAV from a pipe": ("wav", "WAV", lambda data: patched(data, b"data", 4, b"\xff" * 4)),
    "WAV with a wrong RIFF size": ("wav", "WAV", lambda data: patched(data, b"RIFF", 4, bytes(4))),
    "ADPCM with a wrong count": ("wav", "WAV IMA_ADPCM", lambda d: patched(d, b"fact", 8, b"\1")),
    "AU from a pipe": ("au", "AU", lambda data: patched(data, b".snd", 8, b"\xff" * 4)),
    "AIFF with bytes behind it": ("aiff", "AIFF", lambda data: data + bytes(3_000)),
    "RF64, wrong file size": ("rf64", "RF64", lambda d: patched(d, b"ds64", 10, b"\xff")),
    # libsndfile takes the chunk for samples; its log has the right size.
    "W64 with a chunk behind its audio": ("w64", "W64 PCM_32", lambda data: data + W64_LIST),
}
ODD = [pytest.param(*case, id=name) for name, case in ODD.items()]


@pytest.mark.parametrize("ending, kind, change", ODD)
def test_an_odd_but_intact_file_is_read_right(ending, kind, change, tmp_path, sound):
    rate = 48_000 if "OPUS" in kind else 44_100
    clean = encoded(sound(1.5, rate), rate, *kind.split())
    (tmp_path / f"clean.{ending}").write_bytes(clean)
    found = read_or_reason(tmp_path / f"odd.{ending}", change(clean))
    assert np.array_equal(found, plain(tmp_path / f"clean.{ending}"))


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


CHIRP = (0.3 * np.sin(np.arange(44_100.0) ** 2 / 1e6)).astype("float32")
FLOAT, PCM = (encoded(CHIRP, 44_100, "WAV", subtype) for subtype in ("FLOAT", "PCM_16"))
PAGE = "<!DOCTYPE html><title>404: Seite nicht verfügbar</title>"
JAPANESE = "ページが見つかりません" * 9
ENCODINGS = ["cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-32"]
TEXT = "not audio: the file holds text"
BAD = {  # a name and its bytes -> what its reason says
    ("empty.wav", b""): "empty file (0 bytes)",
    ("no_samples.wav", encoded(np.zeros(0), 44_100, "WAV")): "no samples",
    ("truncated.wav", FLOAT[:-9]): "176,391 of the 176,400 bytes of audio that it promises",
    ("size.wav", patched(PCM, b"data", 4, struct.pack("<I", len(PCM)))): "88,200 of the 88,244",
    ("size_0.wav", patched(PCM, b"data", 4, bytes(4))): "no samples: its header says 0 bytes",
    ("rate_0.wav", patched(PCM, b"fmt ", 12, bytes(4))): "a sample rate or a number of channels",
    ("rate.wav", patched(PCM, b"fmt ", 12, b"\xff\xff\xff\x7f")): "a sample rate of 2147483647 Hz",
    ("rate_99.wav", patched(PCM, b"fmt ", 12, b"\x63\0\0\0")): "a sample rate of 99 Hz",
    ("scale.wav", encoded(CHIRP * 32768, 44_100, "WAV", "FLOAT")): "lies between -1 and 1: divide",
    ("nan.wav", FLOAT[:-4] + np.float32("nan").tobytes()): "NaN or infinite samples",
    ("tag.mp3", tag(30)): "no audio behind the file's tag could be decoded",
    ("zeros.wav", bytes(5_000)): "not audio that can be read (soundfile: ",
    ("audio.raw", PCM[44:]): "raw audio without a header has no sample rate",
    **{(f"{kind}.mp3", PAGE.encode(kind)): TEXT for kind in ENCODINGS},
    **{(f"{kind}.wav", JAPANESE.encode(kind)): TEXT for kind in ("shift-jis", "iso-2022-jp")},
    # By these endings libsndfile takes any bytes for samples without a header.
    **{(f"page.{end}", PAGE.encode()): "it may hold text" for end in ("au", "snd", "vox", "gsm")},
    ("cut.au", encoded(CHIRP, 44_100, "AU")[:10]): "",
    # "File does not exist": libsndfile's words for what is no MP3, although its name ends so.
    ("video.mp3", b"\0\0\0\x18ftypM4A " + bytes(range(1, 256)) * 9): "not audio that can be read",
    ("music.m4a", b"\0\0\0\x20ftypM4A " + bytes(range(1, 256)) * 9): "not audio that can be read",
    ("erased.wav", b"\xff" * 5_000): "not audio that can be read",
    ("list.wav", PCM[:40] + bytes(4) + b"LIST" + struct.pack("<I", 200) + bytes(200)): "no samples",
}
FILES = [pytest.param(*file, BAD[file], id=file[0]) for file in BAD]


@pytest.mark.parametrize("name, data, says", FILES)
def test_a_bad_file_has_a_reason_in_plain_words(name, data, says, tmp_path):
    reason = read_or_reason(tmp_path / name, data)
    assert isinstance(reason, str) and says in reason
    assert "File does not exist" not in reason and "SF_INFO" not in reason


def test_the_channels_are_checked_before_they_are_mixed(tmp_path):
    samples = np.stack([CHIRP, -CHIRP], axis=1) * 32768
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    with pytest.raises(BadClip, match="between -1 and 1"):
        read_audio(tmp_path / "a.wav", 1, Settings())


def test_too_long_a_file_is_refused_by_its_header(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.w64", np.zeros(4_000), 8_000)
    monkeypatch.setattr("soundfile.SoundFile.read", None)
    reason = read_or_reason(tmp_path / "a.w64", limit_s=0.4)
    assert reason == "too long: 0.5 s (limit 0.4 s, see --max_duration)"


def test_a_flac_without_its_length_may_be_too_long(tmp_path):
    data = unknown_length(encoded(np.zeros(4_000), 8_000, "FLAC"))
    assert "too long: " in read_or_reason(tmp_path / "a.flac", data, limit_s=0.4)
    assert read_or_reason(tmp_path / "a.flac", data, limit_s=0.5).shape == (1, 4_000)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "FLAC"])
def test_each_of_100_cuts_is_refused(kind, tmp_path, sound):
    """400 in all, of the formats that promise a length: half of them where little is missing."""
    data = encoded(np.concatenate([sound(0.25), sound(0.25, seed=1)]), 44_100, kind, "PCM_16")
    chance = random.Random(kind)
    cuts = [chance.randrange(len(data)) for _ in range(50)]
    cuts += [len(data) - missing for missing in (*range(1, 11), *chance.sample(range(11, 600), 40))]
    path = tmp_path / f"a.{kind.lower()}"
    for length in cuts:
        assert isinstance(read_or_reason(path, data[:length]), str), length
    assert read_or_reason(path, data).shape == (1, 22_050)


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
            assert np.array_equal(found, plain(path))
            good += 1
    assert 0 < good < 60


# ----------------------------------------------------------------------------- the machine at fault


@pytest.mark.parametrize("code, fault", [(2, OSError), (17, MemoryError)])
def test_libsndfiles_machine_faults_are_not_the_clips(code, fault, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"\0")
    monkeypatch.setattr(
        "encodec_tokenizer.SoundFile", Mock(side_effect=soundfile.LibsndfileError(code))
    )
    with pytest.raises(fault):
        read_audio(tmp_path / "a.wav", 1, Settings())


def test_a_decoder_that_does_not_load_is_no_lack_of_memory(tmp_path, monkeypatch):
    for words, fault in (
        ("libgomp.so.1: cannot allocate memory in static TLS block", BadClip),
        ("[enforce fail] . can't allocate memory: you tried to allocate 9 bytes.", RuntimeError),
    ):
        (tmp_path / "a.m4a").write_bytes(b"\0no audio for soundfile\1")
        monkeypatch.setattr("torchaudio.load", Mock(side_effect=RuntimeError(words)))
        with pytest.raises(fault, match="allocate memory"):
            read_audio(tmp_path / "a.m4a", 1, Settings())


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_an_io_error_that_libsndfile_hides_is_not_the_clips(kind, tmp_path, monkeypatch, sound):
    data = encoded(sound(0.5), 44_100, kind)
    (tmp_path / "a").write_bytes(data[: len(data) // 2])  # as read by libsndfile
    fault = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr("encodec_tokenizer.sha256_of", Mock(side_effect=fault))
    with pytest.raises(OSError, match="Input/output error"):
        read_audio(tmp_path / "a", 1, Settings())


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux counts open files there")
def test_files_good_and_bad_are_all_closed(tmp_path, sound):
    kinds = [encoded(sound(0.5), 44_100, kind) for kind in ("MP3", "WAV", "OGG", "FLAC")]
    kinds += [data[: len(data) // 2] for data in kinds] + [b"text" * 99]
    before = len(os.listdir("/proc/self/fd"))
    for data in kinds * 5:
        read_or_reason(tmp_path / "a", data)
    assert len(os.listdir("/proc/self/fd")) <= before
