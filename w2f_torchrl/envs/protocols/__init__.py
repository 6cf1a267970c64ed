"""What published protocols show an agent: DMControl-GB's colours and videos."""
