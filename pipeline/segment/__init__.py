"""One slide, stage by stage, from the plan to the exports.

`stages` is where it starts: the list of stages, each of which reads one store and writes the next. `job` is what a
stage is told, `record` what it reports, `finished` what marks a slide as done.
"""
