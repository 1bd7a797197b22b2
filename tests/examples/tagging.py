"""Tell a clip's labels from how often each code occurs in it, scored by the task's metric, lwlrap.

    pip install numpy pandas scikit-learn scipy
    python encodec_tokenizer.py --dataset curated --aggregate none
    python tests/examples/tagging.py work/tokenized/tokenized_train_curated.csv

The features are a bag of codes per clip: 1024 counts per codebook, summed over the clip's rows. Any
--aggregate will do, and --whole too. The score is cross-validated over clips: no clip is trained on
and tested. Chance is the score of a model that gives every clip the labels' frequencies.

Published figures, for orientation (they come from other models, splits or data than yours):
lwlrap on FSDKaggle2019, by supervised CNNs: 0.758 (the winner), 0.538 (the baseline).
Accuracy on ESC-50, from EnCodec tokens (DASB): 34.8, 37.0, 35.4 % with 2, 8, 32 codebooks, while
continuous baselines reach 92.9 %. Expect little from codes alone.
"""

import argparse
import ast
import warnings

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import label_ranking_average_precision_score
from sklearn.model_selection import KFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, Normalizer

CODES = 1024  # entries of a codebook


def bags_of(table: pd.DataFrame) -> tuple[pd.DataFrame, csr_matrix]:
    """The clips of some rows (fname, labels), and the sum of each clip's code counts."""
    if "tokens" in table:  # of --whole: the rows differ in length
        rows = [np.array(text.split(), dtype=np.int32) for text in table["tokens"]]
    else:
        rows = table.filter(regex=r"^token_\d+$").to_numpy(dtype=np.int32)
    codebooks, _ = ast.literal_eval(table["token_shape"].iloc[0])
    offsets = CODES * np.arange(codebooks, dtype=np.int32)[:, None]
    ids = np.concatenate([(row.reshape(codebooks, -1) + offsets).ravel() for row in rows])
    numbers, names = pd.factorize(table["fname"])
    owners = np.repeat(numbers, [len(row) for row in rows])
    counts = np.ones(len(ids), dtype=np.float32)
    clips = table[["fname", "labels"]].drop_duplicates("fname")
    return clips, csr_matrix((counts, (owners, ids)), (len(names), CODES * codebooks))


def read_bags(path: str) -> tuple[pd.DataFrame, csr_matrix]:
    """The clips of a CSV (fname, labels), and a row of code counts for each [clips, K * 1024]."""
    with pd.read_csv(path, keep_default_na=False, chunksize=500) as parts:
        clips, bags = zip(*map(bags_of, parts))
    clips = pd.concat(clips, ignore_index=True)
    numbers, names = pd.factorize(clips["fname"])  # two parts may share a clip
    whose = csr_matrix((np.ones_like(numbers), (numbers, range(len(clips)))))
    bags = (whose @ vstack(bags)).tocsr()
    assert bags.shape[0] == len(names)
    return clips.drop_duplicates("fname", ignore_index=True), bags


def classifier(c: float = 100) -> OneVsRestClassifier:
    """A logistic regression for each label, on bags scaled to unit length."""
    each = make_pipeline(Normalizer(), LogisticRegression(C=c, solver="liblinear"))
    return OneVsRestClassifier(each)


def lwlrap(targets: np.ndarray, scores: np.ndarray) -> float:
    """Label-weighted label-ranking average precision of [clips, labels], from 0 to 1.

    For each label of a clip: of the labels that score at least as high, the share that is right.
    This is the mean over all labels of all clips, so a clip counts as often as it has labels.
    """
    return label_ranking_average_precision_score(targets, scores, sample_weight=targets.sum(axis=1))


def cross_validate(bags: csr_matrix, targets: np.ndarray, folds: int) -> np.ndarray:
    """The lwlrap of the classifier and of chance in each fold, as [folds, 2]."""
    found = []
    for train, test in KFold(folds, shuffle=True, random_state=0).split(targets):
        with warnings.catch_warnings():  # a rare label may be missing from the training clips
            warnings.filterwarnings("ignore", "Label .* is present in all training examples")
            model = clone(classifier()).fit(bags[train], targets[train])
        chance = np.tile(targets[train].mean(axis=0), (len(test), 1))
        scores = model.predict_proba(bags[test])
        found.append([lwlrap(targets[test], scores), lwlrap(targets[test], chance)])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="tokenized_<stem>.csv of labelled clips")
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    clips, bags = read_bags(args.csv)
    labelled = (clips["labels"] != "").to_numpy()
    binarizer = MultiLabelBinarizer()
    targets = binarizer.fit_transform(clips["labels"][labelled].str.split(","))
    print(f"{len(targets)} labelled clips, {targets.shape[1]} labels, {args.folds} folds")
    found = cross_validate(bags[labelled], targets, args.folds)
    for name, mean, deviation in zip(("bags of codes", "chance"), found.mean(0), found.std(0)):
        print(f"lwlrap of {name}: {mean:.3f} ± {deviation:.3f}")


if __name__ == "__main__":
    main()
