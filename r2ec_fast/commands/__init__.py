"""The commands of `r2ec-fast`: a module and a function each, of one name.

What they need is imported when they run, so that `r2ec-fast --help` is quick. What a user can mend
is an exception; `cli` turns it into one line.
"""
