"""Where the models live, over the processes of a run: whole, in shards, or each layer cut in parts.

    mesh.py       the processes as rows (hosts) and columns (processes of a host)
    shard.py      FSDP2 of student and teacher, and the teacher in the CPU's memory
    gathered.py   whole weights for a while: rollouts, evaluations
    tensor.py     a teacher whose layers several processes compute together, and losses over the rows of all of them
    student.py    what the training loop asks of a student that may be sharded
    whole.py      tensors and models put together again: for export

The engines are torch.distributed (FSDP2, DTensor) and the tensor parallelism of transformers.
"""
