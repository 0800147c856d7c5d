"""How a deployment is started: options, configuration files, commands, and the supervision of a whole trio.

Nothing here imports SGLang or torch, so that a mistake is told in a tenth of a second.
"""
