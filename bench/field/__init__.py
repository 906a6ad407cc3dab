"""A report from the field: what one command finds and measures on somebody's machine, in one file that they send back.

The stages (:mod:`.stages`) are processes, so that one that fails takes nothing with it; :mod:`.run` gives each its time and keeps
what is finished in the file; :mod:`.measure` is what the stages do beyond ``gpubackprop doctor`` and ``bench``; :mod:`.archive`
takes out what is personal; :mod:`.summary` makes it readable.
"""
