"""The command line, `fastbert COMMAND`: a module each, with its arguments. What commands do is in other packages."""
