"""Building blocks of methods on singular values and directions: task matrices, ranks, low-rank merges, WUDI's loss.

Import from the modules: `task_matrices` forms, averages and truncates task vectors as matrices, `ranks` says how many
directions each expert keeps, `low_rank` joins the experts' directions and adds a merge of low rank to the base, and
`interference` has the loss that WUDI minimises.
"""
