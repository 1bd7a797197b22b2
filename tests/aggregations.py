"""Which aggregation keeps most of what tells labels apart? Measured on real, labelled clips.

    python tests/aggregations.py --weights untrained         Debian's Freesound clips, 10 labels
    python tests/aggregations.py --dataset curated --input_dir input    FSDKaggle2019
    python tests/aggregations.py --metadata esc50.csv --audio_dir audio any CSV of clips

Tokenizes the clips with each --aggregate, and predicts all labels of a clip by logistic regression,
cross-validated, from two sets of features: the token columns as numbers, and the bag of codes (how
often each code of each codebook occurs). The score is lwlrap, the metric of FSDKaggle2019. Chance
is the score of the labels' frequencies. All other flags go to encodec_tokenizer.py. Without a
dataset, the clips are those of the Debian package sonic-pi-samples (CC0, from Freesound), fetched
with apt-get and labelled by the first word of their names.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer, scale
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "examples")]

import tagging  # noqa: E402

import encodec_tokenizer as script  # noqa: E402

FEWEST_CLIPS = 8  # of a label
FOLDS, REPEATS = 5, 5


def fetch_clips(folder: Path) -> list[str]:
    """Debian's sonic-pi-samples, as flags: "loop_amen.flac" is labelled "loop"."""
    get = ["apt-get", "download", "-qq", "sonic-pi-samples"]
    subprocess.run(get, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    paths = sorted(folder.rglob("*.flac"))
    with (folder / "sonic_pi.csv").open("w", newline="") as file:
        rows = [(path.name, path.name.partition("_")[0]) for path in paths]
        csv.writer(file).writerows([("fname", "labels"), *rows])
    return ["--metadata", str(folder / "sonic_pi.csv"), "--audio_dir", str(paths[0].parent)]


def compressed(x: np.ndarray) -> np.ndarray:
    """[R, D] in at most R columns with the same inner products, all that the regression uses."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u * s


def cell(model: OneVsRestClassifier, x: np.ndarray, owners: np.ndarray, targets: np.ndarray) -> str:
    """The lwlrap over folds of clips; where a clip has several rows, their scores are added.

    x [R, D], dense or sparse; owners [R], the index of each row's clip; targets [clips, labels].
    """
    found = []
    for repeat in range(REPEATS):
        for train, test in KFold(FOLDS, shuffle=True, random_state=repeat).split(targets):
            seen = np.isin(owners, train)
            fitted = model.fit(x[seen], targets[owners[seen]])
            scores = np.zeros(targets.shape)
            np.add.at(scores, owners[~seen], fitted.predict_proba(x[~seen]))
            found.append(tagging.lwlrap(targets[test], scores[test]))
    return f"{np.mean(found):.3f} ± {np.std(found):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_known_args()
    flags = sys.argv[1:]
    lines = ["| aggregation | token columns | bag of codes |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        if not {"--dataset", "--metadata"} & {flag.partition("=")[0] for flag in flags}:
            flags += fetch_clips(Path(folder))
        for how in tqdm(script.AGGREGATES, desc="aggregations"):
            out = Path(folder) / how
            if script.main([*flags, "--aggregate", how, "--output_dir", str(out)]):
                sys.exit(1)
            (path,) = out.glob("tokenized_*.csv")
            clips, bags = tagging.read_bags(path)
            binarizer = MultiLabelBinarizer()
            targets = binarizer.fit_transform(clips["labels"].str.split(","))
            targets = targets[:, targets.sum(axis=0) >= FEWEST_CLIPS]
            kept = targets.any(axis=1)  # the others have rare labels only
            table = pd.read_csv(path, keep_default_na=False)
            table = table[table["fname"].isin(clips["fname"][kept])]
            targets, bags, owners = targets[kept], bags[kept], pd.factorize(table["fname"])[0]
            tokens = compressed(scale(table.filter(regex=r"^token_\d+$")))
            plain = OneVsRestClassifier(LogisticRegression(C=0.01, solver="liblinear"))
            cells = cell(plain, tokens, owners, targets)
            cells += f" | {cell(tagging.classifier(), bags, np.arange(len(targets)), targets)}"
            lines.append(f"| {how} | {cells} |")
    count, several = targets.shape, table.drop_duplicates("fname")["num_chunks"].gt(1).mean()
    chance = tagging.lwlrap(targets, np.tile(targets.mean(axis=0), (len(targets), 1)))
    lines.append(f"{count[0]} clips of {count[1]} labels, {several:.0%} of several chunks")
    lines[-1] += f"; chance {chance:.3f}; ± over {REPEATS} x {FOLDS} folds"
    print("\n".join(lines))


if __name__ == "__main__":
    main()
