"""What more than one program uses: hosts, mesh and sharding, optimizer, metrics, watch."""
