"""Start a deployment: options, configuration files, commands, and the supervision of a whole trio.

Nothing here imports SGLang or torch, so that a mistake shows in a tenth of a second.
"""
