"""How weights are made and judged: data sets, the trainer, the stain network, evaluation.

`fit` is the trainer, `evaluate` the scores; `data` reads annotated images in every form.
"""
