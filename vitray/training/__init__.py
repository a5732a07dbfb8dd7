"""Models trained on the user's own classes.

config.py           the fields of a `vitray finetune` file
finetuning.py       from a TrainingConfig to a checkpoint
training_run.py     data, checkpoint and teacher, made from the config
labelled_source.py  images with their labels        labels.py          labels and classes
examples.py         images, decoded once            batches.py         images of a step
student.py          what learns, and its losses     teachers.py        scores and vectors to learn
fitting.py          the training loop               workers.py         the loop on several workers
probe_training.py   `train: probe`                  linear_probe.py    a head on stored embeddings
checkpoints.py      the states of a training        out_folder.py      what OUT was begun with
outcome.py          how the training went           outputs.py         the files of OUT
page.py             report.html                     activity.py        what a training does now
work_meter.py       progress within a step
"""
