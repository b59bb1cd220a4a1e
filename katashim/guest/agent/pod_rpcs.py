"""The RPCs of the pod: the sandbox, its network, the guest below it. Called by services.py."""

import os

from katashim.guest.agent import copyfile, guest, linux, mounts, network, rpcerror, storage
from katashim.guest.agent.rpcerror import RpcError
from katashim.guest.agent.rpcs import AGENT_VERSION, Rpcs

_BYTES, _INODES = 1, 2                  # csi.VolumeUsage.Unit
_LOG_LIMIT = 4096                       # of a termination log, as Kubernetes has it
_SHARED = "/run/kata-containers/shared/containers"


class PodRpcs(Rpcs):
    def CreateSandbox(self, request):
        self.sandbox.set_up(request)

    def DestroySandbox(self, request):
        try:
            self.sandbox.destroy()
        finally:
            self.end()      # the machine ends whatever became of the containers

    def GetOOMEvent(self, request):
        return self.make("grpc.OOMEvent", container_id=self.sandbox.next_oom_event())

    def UpdateEphemeralMounts(self, request):
        """Change the size of tmpfs volumes."""
        for item in request.storages:
            if item.driver != "ephemeral" or item.fstype != "tmpfs":
                raise RpcError(rpcerror.INTERNAL,
                               f"Unsupported device type for update: {item.driver} ({item.fstype})")
            options = mounts.Options(word for word in item.options if not word.startswith("fsgid="))
            linux.mount("tmpfs", item.mount_point, "tmpfs", options.flags | linux.MS_REMOUNT, options.data)

    def RemoveStaleVirtiofsShareMounts(self, request):
        """Look at every mount point of the share: that drops what the kernel still remembers of dead ones."""
        for mount_point, _ in mounts.table():
            if mount_point.startswith(_SHARED):
                try:
                    os.stat(mount_point)
                except OSError:
                    continue        # a stale one; having asked is what counts

    def GetDiagnosticData(self, request):
        if request.log_type != "termination_log":
            raise RpcError(rpcerror.INVALID_ARGUMENT,
                           f'"unsupported diagnostic log_type: {request.log_type}"')
        container = self.sandbox.container(request.container_id)
        wanted = container.annotations.get("io.kubernetes.container.terminationMessagePath", "")
        source = next((mount["source"] for mount in container.mounts if mount["destination"] == wanted), None)
        if source is None:
            return self.make("grpc.GetDiagnosticDataResponse")
        with open(source, "rb") as file:
            text = file.read(_LOG_LIMIT).decode(errors="replace")
        return self.make("grpc.GetDiagnosticDataResponse", data=text)

    def CopyFile(self, request):
        copyfile.copy(request)


class NetworkRpcs(Rpcs):
    def UpdateInterface(self, request):
        if request.interface is None:
            raise RpcError(rpcerror.INVALID_ARGUMENT, '"empty update interface request"')
        network.update_interface(request.interface, self.sandbox.settings.hotplug_timeout)
        return request.interface

    def ListInterfaces(self, request):
        return self.make("grpc.Interfaces", Interfaces=[
            self.make("types.Interface", name=name, hwAddr=mac, mtu=mtu, IPAddresses=[
                self.make("types.IPAddress", family=family, address=address, mask=str(prefix))
                for family, address, prefix in addresses])
            for name, mac, mtu, addresses in network.interfaces()])

    def UpdateRoutes(self, request):
        if request.routes is None:
            raise RpcError(rpcerror.INVALID_ARGUMENT, '"empty update routes request"')
        network.update_routes(request.routes.Routes)
        return self._routes()

    def ListRoutes(self, request):
        return self._routes()

    def AddARPNeighbors(self, request):
        if request.neighbors is None:
            raise RpcError(rpcerror.INVALID_ARGUMENT, '"empty add arp neighbours request"')
        network.add_neighbours(request.neighbors.ARPNeighbors)

    def GetIPTables(self, request):
        return self.make("grpc.GetIPTablesResponse", data=guest.iptables_save(request.is_ipv6))

    def SetIPTables(self, request):
        return self.make("grpc.SetIPTablesResponse",
                         data=guest.iptables_restore(request.is_ipv6, request.data))

    def _routes(self):
        return self.make("grpc.Routes", Routes=[self.make("types.Route", **route)
                                                for route in network.routes()])


class GuestRpcs(Rpcs):
    def GetGuestDetails(self, request):
        response = self.make("grpc.GuestDetailsResponse", agent_details=self.make(
            "grpc.AgentDetails", version=AGENT_VERSION, init_daemon=os.getpid() == 1,
            storage_handlers=list(storage.DRIVERS), supports_seccomp=guest.has_seccomp()))
        if request.mem_block_size:
            response.mem_block_size_bytes = guest.memory_block_bytes()
        if request.mem_hotplug_probe:
            response.support_mem_hotplug_probe = guest.has_memory_probe()
        return response

    def OnlineCPUMem(self, request):
        guest.online(request.nb_cpus, request.cpu_only)
        for container in self.sandbox.containers():
            if container.cgroup is not None:
                container.cgroup.widen_cpus(guest.online_cpu_list())

    def MemHotplugByProbe(self, request):
        guest.probe_memory(request.memHotplugProbeAddr)

    def SetGuestDateTime(self, request):
        guest.set_clock(request.Sec, request.Usec)

    def ReseedRandomDev(self, request):
        guest.reseed(request.data)

    def GetMetrics(self, request):
        from katashim.guest.agent import metrics
        return self.make("grpc.Metrics", metrics=metrics.text())

    def GetVolumeStats(self, request):
        total, free, used, inodes, inodes_free, inodes_used = guest.volume_fill(request.volume_guest_path)
        return self.make("grpc.VolumeStatsResponse", usage=[
            self.make("grpc.VolumeUsage", total=total, available=free, used=used, unit=_BYTES),
            self.make("grpc.VolumeUsage", total=inodes, available=inodes_free, used=inodes_used,
                      unit=_INODES)],
            volume_condition=self.make("grpc.VolumeCondition"))

    def ResizeVolume(self, request):
        raise RpcError(rpcerror.UNIMPLEMENTED, "ResizeVolume is not implemented")

    def AddSwap(self, request):
        guest.add_swap(request.PCIPath, self.sandbox.settings.hotplug_timeout)

    def AddSwapPath(self, request):
        linux.swapon(request.path)

    def MemAgentMemcgSet(self, request):
        raise RpcError(rpcerror.INTERNAL, "mem-agent is disabled")

    def MemAgentCompactSet(self, request):
        raise RpcError(rpcerror.INTERNAL, "mem-agent is disabled")
