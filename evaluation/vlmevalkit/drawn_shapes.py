"""The drawn shapes as a benchmark of VLMEvalKit, from the file that `python -m evaluation.shapes` writes."""

import base64
import os

import pandas as pd
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import load

from evaluation.shapes import PATH
from jina_vlm_tools.synthetic.questions import normalize


class DrawnShapes(ImageBaseDataset):
    """Asked as they are, without a word about the answer's form, and right if their words are exactly the expected."""

    TYPE = "VQA"
    DATASET_URL = {"shapes": ""}
    force_use_dataset_prompt = True

    def load_data(self, dataset: str) -> pd.DataFrame:
        """
        Raises:
            FileNotFoundError: the file has not been written.
        """
        if not PATH.is_file():
            raise FileNotFoundError(f"{os.fspath(PATH)} is not there: `python -m evaluation.shapes` writes it.")
        data = pd.read_parquet(PATH)
        data["image"] = [base64.b64encode(image["bytes"]).decode() for image in data["image"]]
        return data.reset_index(names="index")

    def evaluate(self, eval_file: str, **judge_kwargs) -> pd.DataFrame:
        """The share of right answers, from 0 to 1, as `Overall`."""
        data = load(eval_file)
        right = [
            normalize(str(given)) == normalize(str(answer))
            for given, answer in zip(data["prediction"], data["answer"], strict=True)
        ]
        return pd.DataFrame({"Overall": [sum(right) / len(right)]})
