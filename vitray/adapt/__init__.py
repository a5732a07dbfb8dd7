"""Models made the user's own, and smaller.

recipe.py        `vitray finetune JOB.yaml`: what a person writes     examples.py   labelled images, decoded once
finetuning.py    from a recipe to a checkpoint                        fitting.py    the loop, on one worker or many
trainee.py       what of a network learns, and its losses             probe.py      a linear head on stored embeddings
checkpoints.py   where training stands, in storage                    outputs.py    checkpoint, card, metrics, page
shrinking.py     `vitray export MODEL`: the order, what is written    graphs.py      the formats and their quantisers
judging.py       the user's images, answers, speed
"""
