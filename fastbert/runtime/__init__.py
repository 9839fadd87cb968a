"""What a forward is run by: which calls and modules are covered, the layout, the plan, the encoder that takes it."""
