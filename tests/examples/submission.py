"""Write a submission in the form of Kaggle's freesound-audio-tagging-2019: a column per label.

    pip install numpy pandas scikit-learn scipy
    python encodec_tokenizer.py --dataset curated --aggregate none
    python encodec_tokenizer.py --dataset test --aggregate none
    python tests/examples/submission.py work/tokenized/tokenized_train_curated.csv \
        work/tokenized/tokenized_test.csv submission.csv

The classifier is that of tagging.py. The rules of the competition forbade pretrained models, and
EnCodec is one, so this is for study and not a valid entry. Clips of the test set that could not be
tokenized have no row.
"""

import argparse

import pandas as pd
from sklearn.preprocessing import MultiLabelBinarizer
from tagging import classifier, read_bags


def predict(train_csv: str, test_csv: str) -> pd.DataFrame:
    """The test clips' names and the probability of each label of the training clips."""
    train, train_bags = read_bags(train_csv)
    test, test_bags = read_bags(test_csv)
    labelled = (train["labels"] != "").to_numpy()
    binarizer = MultiLabelBinarizer()
    targets = binarizer.fit_transform(train["labels"][labelled].str.split(","))
    model = classifier().fit(train_bags[labelled], targets)
    table = pd.DataFrame(model.predict_proba(test_bags), columns=binarizer.classes_)
    table.insert(0, "fname", test["fname"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="tokenized_train_curated.csv")
    parser.add_argument("test", help="tokenized_test.csv, made with the same settings")
    parser.add_argument("submission", help="the CSV to write")
    args = parser.parse_args()
    table = predict(args.train, args.test)
    table.to_csv(args.submission, index=False)
    print(f"{args.submission}: {len(table)} clips, {len(table.columns) - 1} labels")
    likeliest = table.set_index("fname").idxmax(axis=1)
    for fname, label in likeliest.head(3).items():
        print(f"{fname}: {label} is the likeliest label")


if __name__ == "__main__":
    main()
