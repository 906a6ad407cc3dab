"""A report from the field: one command checks and measures somebody's machine, and leaves one file to send back.

The stages (:mod:`.stages`) are processes, so that a failing one does not take others down; :mod:`.run` limits their time and
keeps finished results in the file; :mod:`.measure` is what the stages do beyond ``gpubackprop doctor`` and ``bench``;
:mod:`.archive` removes personal data; :mod:`.summary` makes it readable.
"""
