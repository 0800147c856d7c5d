"""What each way of sharing MLA's attention over GPUs costs a decode step, worked out before anything is started.

`model` (sizes), `hardware` (rates, links), `work` (bytes and arithmetic of one rank), `price` (seconds), `memory`
(tokens that fit), `choice` (recommendation), `text` (what is printed).
"""
