"""Daft with a model UDF: glob, download, decode, a class with processor and model, write_parquet.

`python daft_udf.py IMAGES OUT MODEL BATCH`.
"""

import sys

import daft
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, download
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, out, model, batch = sys.argv[1:]
texts, numbers = DataType.list(DataType.string()), DataType.list(DataType.float32())
ANSWER = DataType.struct(
    {"label": DataType.string(), "top_labels": texts, "top_scores": numbers, "embedding": numbers}
)


@daft.cls(max_concurrency=1)
class Classifier:
    def __init__(self, model: str) -> None:
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = AutoModelForImageClassification.from_pretrained(model).eval()

    @daft.method.batch(return_dtype=ANSWER, batch_size=int(batch), unnest=True)
    def classify(self, images: Series):
        inputs = self.processor(images.to_pylist(), return_tensors="pt")
        with torch.inference_mode():
            tokens = self.model.vit(**inputs).last_hidden_state
            top = self.model.classifier(tokens[:, 0]).softmax(-1).topk(5)
        rows = []
        for scores, ids, vector in zip(
            top.values.tolist(), top.indices.tolist(), tokens[:, 0].numpy()
        ):
            names = [self.model.config.id2label[n] for n in ids]
            rows.append(
                {
                    "label": names[0],
                    "top_labels": names,
                    "top_scores": scores,
                    "embedding": vector.tolist(),
                }
            )
        return rows


images = daft.from_glob_path(f"{folder}/*.jpg").with_column(
    "image", decode_image(download(col("path")), mode="RGB")
)
images.select("path", Classifier(model).classify(col("image"))).write_parquet(out)
