"""What an evaluation hands on: to seismometer, and into the papers that a hospital must fill."""
