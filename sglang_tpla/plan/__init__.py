"""The planner: the cost of a decode step for each way of sharing MLA's attention over GPUs, before anything starts.

`model` has sizes, `hardware` rates and links, `cost` one rank's work, seconds and memory, `choice` the recommendation,
`text` the printed answer.
"""
