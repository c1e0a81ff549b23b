"""`dcpo bench`: how fast our operators and their peers are on this machine, and how far from the
limit.

shapes, suites, inputs: what is measured on. operators/, peers/: one small file each. harness: one
run of one case. timing, memory, machine, check: what the harness asks. stats, records: numbers, and
the JSON that keeps them. table, plots, compare, roofline, readme: what is said from that JSON
alone. linear, linear_inputs, linear_rows: `dcpo bench linear`, from hidden states instead of
logits. gpu_check: everything that only a GPU can say, in a few calls.
"""
