"""Step programs in machine code: a small machine in C++ that plays their instructions, built by the user's compiler."""
