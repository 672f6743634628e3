"""Which slides a run is given, and where their files are.

`sources` lists them, from folders (`search`), URLs (`remote`) and manifests, and `naming` names their results.
`region_files` says which file of regions belongs to which slide; `staging` copies slides before they are read.
"""
