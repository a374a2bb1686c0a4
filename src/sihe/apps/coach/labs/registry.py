"""Which labs there are."""

LAB_IDS: tuple[str, ...] = ("zero.memory", "allreduce.ring", "attention.cost", "kv.cache")
