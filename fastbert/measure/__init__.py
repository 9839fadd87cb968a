"""What is measured, and how: cases, the machine, counted costs, traces, peers, and the records of it all."""
