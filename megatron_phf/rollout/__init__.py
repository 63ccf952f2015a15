"""Where rollouts come from: engines that answer prompts, sources that give a step its share.

:mod:`.protocol` is what an engine is, :mod:`.engines` the table of them, :mod:`.sources` what the
trainer asks.  Each engine has a folder; none of them is known by name outside it and the table.
May import data, model, weights and what lies below; never train.
"""
