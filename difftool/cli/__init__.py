"""The commands: flags, talk, results and exit codes; the work is the rooms'. Torch-free at import.

app                           the command line: which command, its errors, its exit code
train, sample, noise, convert a command each: ROWS, ABOUT, and run
options, help, completion     rows of options as Typer's, as help, as what shells are told
habits                        flags of other tools, and ours that do the same
lists, reference              what there is, on the terminal and as docs/reference.md
console                       results on stdout; talk, progress and errors on stderr
"""
