"""Models trained on the user's own classes.

config.py        what a person writes for `vitray finetune`    examples.py      labelled images, decoded once
finetuning.py    from a configuration to a checkpoint          fitting.py       the loop, on one worker or many
student.py       what of a network learns, and its losses      linear_probe.py  a linear head on stored embeddings
checkpoints.py   the state of training, in storage             outputs.py       checkpoint, card, metrics, page
"""
