"""Many slides in one run: which there are, who does which, where the work is done, what became of it.

`run` is where it starts; `all_slides` goes through them, `leased_slides` has one, and `slide_stages` its stages.
`inputs` says which slides there are; `manifest` and `lease` who may write where; `workers` and `stream` where and when
the stages are done; `ledger`, `slide_records`, `failures` and `progress` what is told of it.
"""
