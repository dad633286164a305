"""The stages: artifact in, artifact out. The only home of Ray Data and Lightning."""
