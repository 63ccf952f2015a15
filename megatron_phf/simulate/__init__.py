"""Any rank of any job on one CPU: the product's own code on CUDA tensors that have no memory.

``shim`` lets a CPU build of torch take them, ``mode`` runs their operations, ``surface`` and
``groups`` stand in for ``torch.cuda`` and the other ranks, ``memory`` and ``events`` keep what is
reported, ``rank`` runs a job's step, ``match`` compares ranks.  May import ``train`` and what is
below it; nothing but the command line imports it.
"""
