"""The plain Ray Data example, as in Ray's documentation for images and ViT: read_images, a pipeline
in an actor, write_parquet.

Labels alone, which is less work than the others do. `python ray_pipeline.py IMAGES OUT MODEL
BATCH`.
"""

import sys

import ray
from PIL import Image
from transformers import pipeline

folder, out, model, batch = sys.argv[1:]
BATCH = int(batch)


class Classifier:
    def __init__(self) -> None:
        self.classify = pipeline("image-classification", model=model)

    def __call__(self, batch):
        answers = self.classify(
            [Image.fromarray(pixels) for pixels in batch.pop("image")], top_k=5, batch_size=BATCH
        )
        batch["label"] = [top[0]["label"] for top in answers]
        batch["top_labels"] = [[one["label"] for one in top] for top in answers]
        batch["top_scores"] = [[one["score"] for one in top] for top in answers]
        return batch


images = ray.data.read_images(folder, mode="RGB", include_paths=True)
labels = images.map_batches(
    Classifier, compute=ray.data.ActorPoolStrategy(size=1), batch_size=BATCH
)
labels.write_parquet(out)
